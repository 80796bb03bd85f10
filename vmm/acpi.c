/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/machine_internal.h"
int acpi_write(struct machine *m, uint64_t *rsdp, struct error *err) { *rsdp = 0; return 0; }
