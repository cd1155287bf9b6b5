# The front door. Every target works alone on a fresh machine with Python 3.10 or later and a C++20 compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := PATH="$(abspath $(BIN)):$$PATH"
SANITIZED := build/sanitize
WITH_CUDA := build/with-cuda
OBJECTS := build/objects
N ?= 20000
J ?= $(shell nproc)
# Tests side by side; each process has torch in memory. Who runs out of tests takes over the other's last ones, so that
# those of a file mostly share what the file prepares.
PYTEST := $(BIN)/python -m pytest -q
SIDE_BY_SIDE := -n $(shell n=$$(nproc); echo $$((n < 8 ? n : 8))) --dist worksteal
RELEASE := build/release

.PHONY: demo demo-curl build kernels same-code smoke test test-long test-gpu fuzz fuzz-gpu bench lint sanitize sanitize-gpu wheels release-check clean

demo: build ## train the airfoil surrogate, evaluate and draw it
	$(BIN)/python -m examples.airfoil

demo-curl: build ## learn flows without divergence as curls of a potential, beside a net of their velocity
	$(BIN)/python -m examples.solenoidal

build: $(VENV)/ready ## compile the extension in place; only what changed
	$(RUN) python setup.py --quiet build_ext --inplace --build-temp $(OBJECTS)

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

kernels: $(VENV)/ready ## the package with its CUDA kernels, on any machine with nvcc; reads the compiler's report and its code
	MIXED_ATTENTION_CUDA=1 $(RUN) python setup.py --quiet build --build-lib $(WITH_CUDA) --build-temp $(OBJECTS)
	$(BIN)/python tools/check_ptxas.py build/cuda
	$(BIN)/python tools/check_sass.py $$(find build/cuda -path '*hopper*' -name '*.o')
	cd $(WITH_CUDA) && $(abspath $(BIN))/python -c "import torch; from mixed_attention import ops; \
	  assert ops.has_kernels('cuda', torch.float32), 'the CUDA kernels are not registered'"

same-code: $(VENV)/ready ## whether the kernels' machine code is what BEFORE=file holds; without it, writes that to standard output
	@$(BIN)/python tools/same_code.py build/cuda $(if $(BEFORE),--against $(BEFORE))

smoke: build ## the C++ tests of the kernels, which it takes as they are compiled for the package
	$(RUN) cmake -S . -B build/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DMIXED_ATTENTION_OBJECTS=$(abspath $(OBJECTS))
	$(RUN) cmake --build build/cmake
	$(RUN) ctest --test-dir build/cmake --output-on-failure

test: build smoke ## all tests but the long and the GPU ones
	$(PYTEST) $(SIDE_BY_SIDE)

test-long: build smoke ## the long random sweep as well
	build/cmake/walks 1000000
	HYPOTHESIS_PROFILE=long $(PYTEST) $(SIDE_BY_SIDE) -m "not gpu"

test-gpu: build ## what needs a CUDA device
	$(PYTEST) -m gpu

fuzz: build ## N random problems against the oracle; prints the seed of a failure and a smaller input that still fails
	$(BIN)/python tools/fuzz.py -n $(N) -j $(J)

fuzz-gpu: build ## the same on a CUDA device, a third of them forced onto the portable kernels
	$(BIN)/python tools/fuzz.py --device cuda -n $(N) -j $(J) --families hopper,hopper,portable

bench: build ## measure ours beside the peers that are installed
	$(BIN)/python -m bench

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*')
	$(BIN)/yamllint --strict .github
	$(BIN)/shellcheck .ci/run $$(git ls-files '*.sh')

sanitize: build ## the tests under AddressSanitizer and UBSan, with the kernels of every instruction set
	mkdir -p $(SANITIZED) && cp -r mixed_attention $(SANITIZED)/ && rm -f $(SANITIZED)/mixed_attention/*.so
	MIXED_ATTENTION_SANITIZE=address,undefined $(RUN) python setup.py --quiet build_ext \
	  --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	tools/sanitize.sh $(SANITIZED) $(BIN)/python

sanitize-gpu: build ## small GPU tests under compute-sanitizer
	tools/sanitize_gpu.sh $(BIN)/python

wheels: $(VENV)/ready ## builds sdist and both wheels and tries them in fresh environments; KERNELS=... is a wheel that is there
	$(RUN) tools/wheels.sh $(BIN)/python $(RELEASE) $(KERNELS)

release-check: wheels ## what a release must pass: make wheels

clean:
	rm -rf build dist *.egg-info mixed_attention/*.so $(VENV)
