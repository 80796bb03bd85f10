# SPDX-License-Identifier: Apache-2.0
# Every tests/fuzz/NAME.c but replay.c is a fuzzer (LLVMFuzzerTestOneInput) with its kept corpus in
# tests/fuzz/corpus/NAME.
#   make fuzz          libFuzzer through clang, FUZZ_SECONDS (default 20) each, in build-fuzz
#   make fuzz-nbd      RUNS (default 100000) streams each to the NBD server and its parsers
#   make fuzz-memory   RUNS streams each to the receiver of memory and to the loader of a machine's state (which needs
#                      /dev/kvm), and to their parsers
#   make fuzz-keep     what they found that is new goes into the kept corpora, minimised
#   make fuzz-replay   the corpora once through an ordinary build: no clang needed
FUZZ_SECONDS ?= 20
RUNS ?= 100000
FUZZ_RSS_MB ?= 2048
FUZZ_LIMIT ?= -max_total_time=$(FUZZ_SECONDS)
FUZZ_MAKE := $(MAKE) --no-print-directory B=build-fuzz CC=clang WERROR=0 SAN=address,undefined,fuzzer-no-link FUZZ_ENGINE=1
FUZZ_NAMES := $(patsubst tests/fuzz/%.c,%,$(filter-out tests/fuzz/replay.c,$(wildcard tests/fuzz/*.c)))
FUZZERS := $(FUZZ_NAMES:%=$(B)/fuzz/%)
FUZZ_MAIN := $(if $(FUZZ_ENGINE),,$(B)/tests/fuzz/replay.o)

# The libraries last, so that a fuzzer takes only what it needs of them.
$(FUZZERS): $(B)/fuzz/%: $(B)/tests/fuzz/%.o $(FUZZ_MAIN) $(ALL_LINK:%=$(B)/lib%.a)
	$(call say,LD,$@) mkdir -p $(@D); $(CC) -o $@ $(filter %.o,$^) -Wl,--start-group $(filter %.a,$^) -Wl,--end-group $(LDFLAGS_ALL) $(if $(FUZZ_ENGINE),-fsanitize=fuzzer,) $(LIBS_ALL)

.PHONY: fuzz fuzz-nbd fuzz-memory fuzz-keep fuzz-run fuzz-keep-run fuzz-replay
fuzz:
	$(Q)if command -v clang >/dev/null; then \
		$(FUZZ_MAKE) fuzz-run; \
	else echo "skipped: clang is not installed: the corpora are only replayed"; $(MAKE) --no-print-directory fuzz-replay; fi
fuzz-nbd:
	$(Q)$(MAKE) --no-print-directory fuzz FUZZ_NAMES="nbd_options nbd_server" FUZZ_LIMIT=-runs=$(RUNS)
# What a frame or a state takes is bounded: so is the process.
fuzz-memory:
	$(Q)$(MAKE) --no-print-directory fuzz FUZZ_NAMES="receiver machine memxfer state" FUZZ_LIMIT=-runs=$(RUNS) FUZZ_RSS_MB=512
fuzz-keep:
	$(Q)$(FUZZ_MAKE) fuzz-keep-run
fuzz-keep-run: $(FUZZERS)
	$(Q)set -e; for n in $(FUZZ_NAMES); do \
		[ ! -d $(B)/corpus/$$n ] || { mkdir -p tests/fuzz/corpus/$$n; \
		$(B)/fuzz/$$n -merge=1 -max_len=2048 tests/fuzz/corpus/$$n $(B)/corpus/$$n >$(B)/fuzz/$$n.merge.log 2>&1; \
		echo "$$n: $$(ls tests/fuzz/corpus/$$n | wc -l) inputs, $$(cat tests/fuzz/corpus/$$n/* | wc -c) bytes"; }; \
	done
fuzz-run: $(FUZZERS)
	$(Q)set -e; for n in $(FUZZ_NAMES); do \
		mkdir -p $(B)/corpus/$$n; \
		$(B)/fuzz/$$n $(FUZZ_LIMIT) -timeout=10 -rss_limit_mb=$(FUZZ_RSS_MB) -print_final_stats=1 \
			-artifact_prefix=$(B)/fuzz/$$n- $(B)/corpus/$$n $$([ ! -d tests/fuzz/corpus/$$n ] || echo tests/fuzz/corpus/$$n) \
			>$(B)/fuzz/$$n.log 2>&1 || { tail -n 40 $(B)/fuzz/$$n.log; echo "FAIL $$n"; exit 1; }; \
		echo "ok   $$n: $$(grep -a '^skipped: ' $(B)/fuzz/$$n.log || sed -n 's/^stat::number_of_executed_units: *\(.*\)/\1 runs/p' $(B)/fuzz/$$n.log)"; \
	done
fuzz-replay: $(FUZZERS)
	$(Q)set -e; for n in $(FUZZ_NAMES); do \
		[ -d tests/fuzz/corpus/$$n ] || { echo "no corpus: $$n"; continue; }; \
		$(B)/fuzz/$$n tests/fuzz/corpus/$$n/*; \
	done
