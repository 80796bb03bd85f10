# SPDX-License-Identifier: Apache-2.0
# Side-by-side measurements (bench/README.md). Never part of check: they want the machine for themselves.
BENCH_PROGRAMS := $(B)/bench/mirror_driver
$(B)/bench/mirror_driver: $(B)/bench/mirror_driver.o $(B)/bench/guest_load.o $(LINK_mirror:%=$(B)/lib%.a)
	$(call say,LD,$@) $(CC) -o $@ $(filter %.o,$^) -Wl,--start-group $(filter %.a,$^) -Wl,--end-group $(LDFLAGS_ALL) $(LIBS_ALL)
.PHONY: bench bench-storage
bench: bench-storage
bench-storage: all $(BENCH_PROGRAMS)
	$(Q)SNM_BUILD=$(B) bench/storage
