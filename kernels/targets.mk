# The kernels' own targets; the top Makefile includes this file.
NATIVE_BUILD ?= build/native
NATIVE_SRC = $(filter-out kernels/bind.cpp,$(wildcard kernels/*.cpp)) tests/native/test_native.cpp
NATIVE_DEPS = $(NATIVE_SRC) $(wildcard kernels/*.h) kernels/kernels.inc
NATIVE_FLAGS = -std=c++17 -O1 -g -ffp-contract=off -Wall -Wextra -Wno-missing-field-initializers
AARCH64_CXX ?= aarch64-linux-gnu-g++
QEMU_AARCH64 ?= qemu-aarch64 -L /usr/aarch64-linux-gnu

.PHONY: test-native test-neon sanitize bench-kernels

# Every ISA of this machine, with scratch memory full of NaN so that nothing is read before it was written.
test-native: $(NATIVE_BUILD)/native
	$< 200

# Debian: apt-get install g++-aarch64-linux-gnu qemu-user
test-neon: $(NATIVE_BUILD)/neon
	$(QEMU_AARCH64) $< 25

# Address and undefined-behaviour sanitizers over drawn shapes, the thread sanitizer over the threaded paths.
sanitize: $(NATIVE_BUILD)/asan $(NATIVE_BUILD)/tsan
	$(NATIVE_BUILD)/asan 60 1
	$(NATIVE_BUILD)/tsan 25 2

bench-kernels: .venv/.installed
	$(BIN)/python bench/bench_kernels.py $(if $(PEERS),--peers $(PEERS)) --out bench/results/kernels

$(NATIVE_BUILD)/native: $(NATIVE_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(NATIVE_FLAGS) -DFASTSPARSE_POISON -DFASTSPARSE_STD_THREADS $(NATIVE_SRC) -o $@ -ldl -lpthread

$(NATIVE_BUILD)/neon: $(NATIVE_DEPS)
	@mkdir -p $(@D)
	$(AARCH64_CXX) $(NATIVE_FLAGS) -O2 -DFASTSPARSE_POISON -DFASTSPARSE_STD_THREADS $(NATIVE_SRC) -o $@ -ldl -lpthread

$(NATIVE_BUILD)/asan: $(NATIVE_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(NATIVE_FLAGS) -fsanitize=address,undefined -fno-sanitize-recover=all -DFASTSPARSE_STD_THREADS $(NATIVE_SRC) -o $@ -ldl -lpthread

$(NATIVE_BUILD)/tsan: $(NATIVE_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(NATIVE_FLAGS) -fsanitize=thread -DFASTSPARSE_STD_THREADS $(NATIVE_SRC) -o $@ -ldl -lpthread
