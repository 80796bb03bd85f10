# SPDX-License-Identifier: Apache-2.0
# Side-by-side measurements (bench/README.md). Never part of check: they want the machine for themselves.
BENCH_PROGRAMS := $(B)/bench/mirror_driver $(B)/bench/memory_limit
$(B)/bench/mirror_driver: $(B)/bench/mirror_driver.o $(B)/bench/guest_load.o $(LINK_mirror:%=$(B)/lib%.a)
	$(call say,LD,$@) $(CC) -o $@ $(filter %.o,$^) -Wl,--start-group $(filter %.a,$^) -Wl,--end-group $(LDFLAGS_ALL) $(LIBS_ALL)
$(B)/bench/memory_limit: $(B)/bench/memory_limit.o
	$(call say,LD,$@) $(CC) -o $@ $< $(LDFLAGS_ALL) $(LIBS_ALL)
.PHONY: bench bench-storage bench-memory
bench: bench-storage bench-memory
bench-storage: all $(BENCH_PROGRAMS)
	$(Q)SNM_BUILD=$(B) bench/storage
bench-memory: all $(BENCH_PROGRAMS) guest
	$(Q)SNM_BUILD=$(B) bench/memory
