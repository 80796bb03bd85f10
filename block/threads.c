/* SPDX-License-Identifier: Apache-2.0 */
/* Thread pool: the whole engine where io_uring is refused, and beside a ring what io_uring cannot do. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/confine.h"
#include "block/raw.h"

struct raw_pool {
	pthread_mutex_t lock;
	pthread_cond_t work;
	struct raw_op *head, **tail;
	bool stopping;
	unsigned nthreads;
	pthread_t threads[];
};

static void *pool_main(void *arg)
{
	struct raw_pool *pool = arg;
	pthread_setname_np(pthread_self(), "disk-pool");
	confine_self(CONFINE_DISK);
	for (;;) {
		pthread_mutex_lock(&pool->lock);
		while (!pool->head && !pool->stopping)
			pthread_cond_wait(&pool->work, &pool->lock);
		struct raw_op *op = pool->head;
		if (op) {
			pool->head = op->next;
			if (!pool->head)
				pool->tail = &pool->head;
		}
		pthread_mutex_unlock(&pool->lock);
		if (!op)
			return NULL;
		raw_op_run(op);
	}
}

void raw_pool_submit(struct raw_pool *pool, struct raw_op *op)
{
	op->next = NULL;
	SCOPE_LOCK(&pool->lock);
	*pool->tail = op;
	pool->tail = &op->next;
	pthread_cond_signal(&pool->work);
}

void raw_pool_free(struct raw_pool *pool)
{
	if (!pool)
		return;
	pthread_mutex_lock(&pool->lock);
	pool->stopping = true;
	pthread_cond_broadcast(&pool->work);
	pthread_mutex_unlock(&pool->lock);
	for (unsigned i = 0; i < pool->nthreads; i++)
		pthread_join(pool->threads[i], NULL);
	pthread_cond_destroy(&pool->work);
	pthread_mutex_destroy(&pool->lock);
	free(pool);
}

int raw_pool_create(unsigned nthreads, struct raw_pool **out, struct error *err)
{
	struct raw_pool *pool = calloc(1, sizeof *pool + nthreads * sizeof pool->threads[0]);
	if (!pool)
		return error_errno(err, ENOMEM, "disk thread pool");
	pthread_mutex_init(&pool->lock, NULL);
	pthread_cond_init(&pool->work, NULL);
	pool->tail = &pool->head;
	/* Signals are for the program's own threads. */
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	int rc = 0;
	while (pool->nthreads < nthreads && rc == 0) {
		rc = pthread_create(&pool->threads[pool->nthreads], NULL, pool_main, pool);
		if (rc == 0)
			pool->nthreads++;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc) {
		raw_pool_free(pool);
		return error_errno(err, rc, "disk thread pool");
	}
	*out = pool;
	return 0;
}
