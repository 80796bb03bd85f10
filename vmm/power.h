/* SPDX-License-Identifier: Apache-2.0 */
/* What the ACPI tables say about power. */
#ifndef VMM_POWER_H
#define VMM_POWER_H

#define POWER_SLEEP_CONTROL 0x600
#define POWER_SLEEP_STATUS  0x601
#define POWER_SLEEP_TYPE_S5 5
#define POWER_RESET_PORT    0xcf9
#define POWER_RESET_VALUE   0x06
#define POWER_BUTTON_GSI    10

#endif
