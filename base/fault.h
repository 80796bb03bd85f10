/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_FAULT_H
#define BASE_FAULT_H

#include <stdbool.h>

/*
 * Fault points by name, for tests: SNM_FAULT="POINT:ACTION[,POINT:ACTION...]".
 *   kill   the process kills itself with SIGKILL there
 *   hold   creates the file $SNM_FAULT_DIR/POINT.hit and waits until $SNM_FAULT_DIR/POINT.go exists (or the
 *          folder has gone); the other threads run on
 *   fail   fault_point returns true: the caller behaves as if the operation had failed with EIO
 *   failif fail, while the file $SNM_FAULT_DIR/POINT.fail exists
 * The points confine-KIND (base/confine_lists.c) with `fail` make a thread of that kind ask for what its
 * filter does not have, which is told and fails; confine-KIND-grave for what ends the process. Without
 * SNM_FAULT a call costs a load and a branch. Any thread.
 */
bool fault_point(const char *point);

#endif
