# SPDX-License-Identifier: Apache-2.0
# Small programs that tests run: tests/helpers/X.c -> build/tests/helpers/X, linked as snvmm is.
HELPER_PROGRAMS := $(patsubst %.c,$(B)/%,$(wildcard tests/helpers/*.c))
TEST_HELPERS += $(HELPER_PROGRAMS)
$(HELPER_PROGRAMS): $(B)/tests/helpers/%: $(B)/tests/helpers/%.o $(LINK_vmm:%=$(B)/lib%.a)
	$(call say,LD,$@) $(CC) -o $@ $< -Wl,--start-group $(LINK_vmm:%=$(B)/lib%.a) -Wl,--end-group $(LDFLAGS_ALL) $(LIBS_ALL)
