/* SPDX-License-Identifier: Apache-2.0 */
/* A small AML encoder (ACPI 6.4, chapter 20): just what the DSDT needs. */
#ifndef VMM_AML_H
#define VMM_AML_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AML_BYTES_MAX 8192

struct aml {
	uint8_t bytes[AML_BYTES_MAX];
	size_t len;
	bool overflow; /* sticky */
};

/* Where a package began; give it to aml_end. */
typedef size_t aml_mark;

void aml_byte(struct aml *a, uint8_t v);
void aml_word(struct aml *a, uint16_t v);
void aml_dword(struct aml *a, uint32_t v);
/* Data objects. */
void aml_integer(struct aml *a, uint32_t v);
void aml_string(struct aml *a, const char *s);
void aml_eisa_id(struct aml *a, const char *id); /* "PNP0A08" */
/* A path: four characters each, "\\" in front of an absolute one, "." between: "\\_SB_.PWRB". */
void aml_path(struct aml *a, const char *path);
void aml_name(struct aml *a, const char *name); /* Name(name, ...): a data object follows */

aml_mark aml_scope(struct aml *a, const char *path);
aml_mark aml_device(struct aml *a, const char *name);
aml_mark aml_method(struct aml *a, const char *name, unsigned args);
aml_mark aml_if_arg0_is(struct aml *a, uint32_t value);
aml_mark aml_package(struct aml *a, uint8_t elements);
void aml_end(struct aml *a, aml_mark mark);
void aml_notify(struct aml *a, const char *path, uint32_t value);

/* A resource template; resources between. */
aml_mark aml_resources(struct aml *a);
void aml_resources_end(struct aml *a, aml_mark mark);
void aml_io(struct aml *a, uint16_t port, uint8_t len);
void aml_irq(struct aml *a, unsigned irq); /* edge, active high */
void aml_interrupt_edge(struct aml *a, uint32_t gsi);
void aml_bus_range(struct aml *a, uint16_t first, uint16_t last);
void aml_io_window(struct aml *a, uint16_t first, uint16_t last);
void aml_memory_window(struct aml *a, uint32_t first, uint32_t last);

#endif
