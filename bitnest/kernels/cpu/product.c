/* One matrix times coded inputs, whatever the weight. */

#include "tables.h"

static void integer_product(const weight_t *w, const inputs_t *x, float *y, int64_t stride,
                            int64_t first, int64_t last) {
    if (x->tokens == 1)
        product_one(w, x, y, first, last);
    else if (!product_few(w, x, y, stride, first, last))
        product_many(w, x, y, stride, first, last);
}

void product(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first, int64_t last) {
    if (x->tokens < 1 || first >= last) return;
    switch (w->engine) {
    case INTEGER: integer_product(w, x, y, stride, first, last); return;
    case TABLE:
    case DENSE: table_product(w, x, y, stride, first, last); return;
    }
}

/* Which instructions this build uses. */
const char *isa(void) { return ISA; }
