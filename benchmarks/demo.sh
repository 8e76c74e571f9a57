#!/bin/sh
# make demo: compress the embedded model, measure what was lost, serve it, ask it something.
set -eu
BIN=${BIN:-.venv/bin}
OUT=$(mktemp -d "${TMPDIR:-/tmp}/bitnest-demo.XXXXXX")
SERVER=
cleanup() {
    [ -z "$SERVER" ] || kill "$SERVER" 2>/dev/null || true
    rm -rf "$OUT"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

say() { printf '\n$ %s\n' "$*"; "$@"; }

say "$BIN/bitnest" analyze demo -o "$OUT/demo-statistics" --quiet
say "$BIN/bitnest" compress demo --bits 3.5 --statistics "$OUT/demo-statistics" -o "$OUT/demo-3.5"
say "$BIN/bitnest" compress demo --format int4-g128 -o "$OUT/demo-int4" --quiet
say "$BIN/bitnest" compress demo --format int3-g128 -o "$OUT/demo-int3" --quiet
say "$BIN/bitnest" eval "$OUT/demo-int4" "$OUT/demo-3.5" "$OUT/demo-int3" --against demo

printf '\n$ bitnest serve %s --port 0\n' "$OUT/demo-3.5"
"$BIN/bitnest" serve "$OUT/demo-3.5" --port 0 --model-name demo 2>"$OUT/server.log" &
SERVER=$!
"$BIN/python" - "$OUT/server.log" <<'EOF'
"""Wait for the server's address, then ask for a completion with the openai client."""
import re
import sys
import time
from pathlib import Path

from openai import OpenAI

log = Path(sys.argv[1])
for _ in range(600):
    found = re.search(r"http://[\d.]+:\d+", log.read_text())
    if found:
        break
    time.sleep(0.1)
else:
    sys.exit("the server did not start:\n" + log.read_text())
client = OpenAI(base_url=found[0] + "/v1", api_key="none")
prompt = "It was a dark night, and"
answer = client.completions.create(model="demo", prompt=prompt, max_tokens=40, temperature=0)
print(f"{found[0]}/v1/completions\n{prompt}{answer.choices[0].text}")
EOF
kill -TERM "$SERVER"
wait "$SERVER"
SERVER=
printf '\ndemo: done\n'
