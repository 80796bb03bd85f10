/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_CLEANUP_H
#define BASE_CLEANUP_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* Clean-up by attribute. File descriptors start at -1; pointers start at NULL. */
static inline void cleanup_free_ptr(void *p)
{
	free(*(void **)p);
}
static inline void cleanup_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
}
static inline void cleanup_file(FILE **f)
{
	if (*f)
		fclose(*f);
}
static inline void cleanup_unlock(pthread_mutex_t **m)
{
	if (*m)
		pthread_mutex_unlock(*m);
}
static inline pthread_mutex_t *scope_lock_take(pthread_mutex_t *m)
{
	pthread_mutex_lock(m);
	return m;
}

#define CLEANUP(fn)  __attribute__((cleanup(fn)))
#define CLEANUP_FREE CLEANUP(cleanup_free_ptr)
#define CLEANUP_FD   CLEANUP(cleanup_fd)
#define CLEANUP_FILE CLEANUP(cleanup_file)

#define SCOPE_CAT_(a, b) a##b
#define SCOPE_CAT(a, b)	 SCOPE_CAT_(a, b)
/* Holds the mutex to the end of the enclosing block. */
#define SCOPE_LOCK(mutex)                                                                                    \
	CLEANUP(cleanup_unlock)                                                                              \
	__attribute__((unused)) pthread_mutex_t *SCOPE_CAT(scope_lock_, __LINE__) = scope_lock_take(mutex)

#define steal_ptr(p)                                                                                         \
	__extension__({                                                                                      \
		__typeof__(p) stolen_ = (p);                                                                 \
		(p) = NULL;                                                                                  \
		stolen_;                                                                                     \
	})
static inline int steal_fd(int *fd)
{
	int stolen = *fd;
	*fd = -1;
	return stolen;
}

#define ARRAY_SIZE(a)		      (sizeof(a) / sizeof((a)[0]))
#define container_of(p, type, member) ((type *)((char *)(p)-offsetof(type, member)))

#endif
