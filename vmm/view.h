/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_VIEW_H
#define VMM_VIEW_H

#include "vmm/vm.h"

/*
 * What of the file system a VMM may still change, once it knows its VM: the folder (vm->dirfd, under whatever
 * name), the definition's disks, the records; in the state directory it may rename and remove folders. All
 * else is read-only, and programs are executed from the system's folders alone. For the calling thread, the
 * threads that it starts from here on, and qemu-nbd. By Landlock, which takes no privilege, unlike a mount
 * namespace; a kernel without it leaves things as they are, and the log says so.
 */
int view_restrict(const struct vm *vm, struct error *err);

#endif
