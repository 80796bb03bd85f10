/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_POSTCOPY_FAULTS_H
#define MEMXFER_POSTCOPY_FAULTS_H

#include <stddef.h>

#include "memxfer/postcopy.h"

/* Private to postcopy*.c: userfaultfd(2) on a space. */

/* From here on whoever touches a page that the file lacks waits for it. */
int faults_register(int fd, const struct mem_space *space, struct error *err);
/* Who waits goes on, with zeroes where nothing is. */
int faults_unregister(int fd, const struct mem_space *space, struct error *err);
/* The page of the next fault in the queue; -EAGAIN when there is none. */
int faults_next(int fd, const struct mem_space *space, uint64_t *page, struct error *err);
/*
 * Puts npages at data (NULL: zeroes) into the space and lets those go on who wait for them. Pages that are
 * there stay as they are: *present counts them.
 */
int faults_fill(int fd, const struct mem_space *space, uint64_t first, uint64_t npages, const uint8_t *data,
		uint64_t *present, struct error *err);

#endif
