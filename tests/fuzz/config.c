/* SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdlib.h>

#include "host/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Refused with a sentence, or complete. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct host_config *cfg = NULL;
	struct error err = ERROR_INIT;

	if (host_config_parse((const char *)data, size, "/etc/snmigrate/fuzz.ini", &cfg, &err) < 0) {
		if (!err.code || !*err.message)
			abort();
		return 0;
	}
	if (!*cfg->name || *cfg->state_dir != '/' || !*cfg->control || !*cfg->listen ||
	    (cfg->npeers && !*cfg->ca))
		abort();
	for (unsigned i = 0; i < cfg->npeers; i++)
		if (host_config_peer(cfg, cfg->peers[i].name) != &cfg->peers[i] || !*cfg->peers[i].address)
			abort();
	host_config_free(cfg);
	return 0;
}
