/* SPDX-License-Identifier: Apache-2.0 */
/* The ACPI tables as bytes, apart from where they go. */
#ifndef VMM_ACPI_H
#define VMM_ACPI_H

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

/* Fills out[0..cap) with RSDP and tables meant for guest-physical `base`; the RSDP is at `base`. Returns the
 * length or a negative errno. */
int acpi_build(unsigned ncpus, uint64_t base, uint8_t *out, size_t cap, struct error *err);
/* The same DSDT alone, for a judge of AML. */
int acpi_build_dsdt(uint8_t *out, size_t cap, struct error *err);

#endif
