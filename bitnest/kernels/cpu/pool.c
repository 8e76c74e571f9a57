/* A team of threads that the caller is part of.

   A job is a number that goes up: members that spin see it change, members that slept are woken.
   Between tokens of a model the next job comes within microseconds, so members spin a while first;
   a team that nobody uses takes no time. Barriers spin: all members are running then. A barrier in
   a machine busier than its cores yields now and then, so that the awaited thread can run. */

#define _GNU_SOURCE
#include "cpu.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define MAX_THREADS 256
#define SPINS 20000      /* some tens of microseconds, then sleep */
#define BARRIER_SPINS 20000 /* then let another thread run */

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

static struct {
    pthread_mutex_t use, lock; /* use: one job at a time */
    pthread_cond_t wake;
    int threads, started; /* wanted, and members there are: all take part in a ticket */
    unsigned seen[MAX_THREADS]; /* the ticket at which a member was started */
    job_t job;
    void *argument;
    _Atomic int sleepers, left;
    _Atomic unsigned ticket;
    _Atomic int arrived;
    _Atomic unsigned phase;
} team = {.use = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER, .threads = 1, .started = 1};

static _Thread_local int inside; /* a job: nested runs run alone */
static _Thread_local int alone;  /* a job that runs alone has no barrier to wait at */

static void *member(void *number) {
    int thread = (int)(intptr_t)number;
    unsigned seen = team.seen[thread];
    inside = 1;
    for (;;) {
        int spins = 0;
        while (atomic_load_explicit(&team.ticket, memory_order_acquire) == seen && spins++ < SPINS) PAUSE();
        if (atomic_load(&team.ticket) == seen) {
            pthread_mutex_lock(&team.lock);
            atomic_fetch_add(&team.sleepers, 1);
            while (atomic_load(&team.ticket) == seen) pthread_cond_wait(&team.wake, &team.lock);
            atomic_fetch_sub(&team.sleepers, 1);
            pthread_mutex_unlock(&team.lock);
        }
        seen = atomic_load_explicit(&team.ticket, memory_order_acquire);
        if (thread < team.threads) team.job(team.argument, thread, team.threads);
        atomic_fetch_sub_explicit(&team.left, 1, memory_order_release);
    }
    return NULL;
}

/* Threads do not survive a fork, and a lock may have been held by one of them. */
static void forked(void) {
    pthread_mutex_init(&team.use, NULL);
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.wake, NULL);
    team.started = 1;
    atomic_store(&team.sleepers, 0);
    inside = alone = 0;
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forked); }

static void start_members(void) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (team.started < team.threads) {
        pthread_t made;
        team.seen[team.started] = atomic_load(&team.ticket);
        if (pthread_create(&made, &attributes, member, (void *)(intptr_t)team.started)) {
            team.threads = team.started;
            break;
        }
        team.started++;
    }
    pthread_attr_destroy(&attributes);
}

void set_threads(int threads) {
    pthread_mutex_lock(&team.use);
    team.threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    pthread_mutex_unlock(&team.use);
}

int get_threads(void) { return team.threads; }

void run(job_t job, void *argument) {
    if (inside || pthread_mutex_trylock(&team.use)) {
        /* within a job, or beside one of another thread */
        int outer = alone;
        alone = 1;
        job(argument, 0, 1);
        alone = outer;
        return;
    }
    start_members();
    int threads = team.threads;
    if (threads == 1) {
        alone = inside = 1;
        job(argument, 0, 1);
        alone = inside = 0;
        pthread_mutex_unlock(&team.use);
        return;
    }
    team.job = job;
    team.argument = argument;
    atomic_store(&team.arrived, 0);
    atomic_store(&team.left, team.started - 1);
    atomic_fetch_add(&team.ticket, 1); /* before sleepers are looked at */
    if (atomic_load(&team.sleepers)) {
        pthread_mutex_lock(&team.lock);
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.lock);
    }
    inside = 1;
    job(argument, 0, threads);
    inside = 0;
    for (int spins = 0; atomic_load_explicit(&team.left, memory_order_acquire);) {
        PAUSE();
        if (++spins == BARRIER_SPINS) {
            sched_yield();
            spins = 0;
        }
    }
    pthread_mutex_unlock(&team.use);
}

void barrier(void) {
    if (alone) return;
    unsigned phase = atomic_load_explicit(&team.phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team.arrived, 1, memory_order_acq_rel) + 1 == team.threads) {
        atomic_store_explicit(&team.arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team.phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team.phase, memory_order_acquire) == phase;) {
        PAUSE();
        if (++spins == BARRIER_SPINS) {
            sched_yield();
            spins = 0;
        }
    }
}
