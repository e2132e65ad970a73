# make train      watch a meta-training run; needs python3 >= 3.10 with venv and a C++ compiler, makes everything else
# make test       the core suite, in the same virtual environment
# make test-all   more of it, and the GPU kernels: compiled ahead of time, and in Triton's interpreter
# make test-exhaustive   every test of both; takes twice as long
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/sinusoid
PYTEST ?=
bin := $(VENV)/bin
OLDEST := $(VENV)/triton-3.6.0
pytest := OMP_NUM_THREADS=1 $(bin)/python -m pytest
parallel := -n auto --maxprocesses 4 --maxschedchunk 1
compiled := tests/test_triton_aot.py
interpreted := tests/test_triton_interpreter.py tests/test_triton_resident.py tests/test_triton_families.py \
    tests/test_triton_algorithms.py
also_interpreted := tests/test_triton_tuning.py tests/test_triton_extremes.py
without_gpu := $(addprefix --ignore=,$(compiled) $(interpreted) $(also_interpreted))
pip := $(bin)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: train test test-all test-exhaustive test-oldest-triton bench core lint types sanitize format clean
.DELETE_ON_ERROR:

train: core
	$(bin)/maml-fast train sinusoid --out $(RUN)

test: core $(VENV)/.test
	$(pytest) $(or $(PYTEST),$(parallel) -m "not exhaustive and not thorough" $(without_gpu))

test-exhaustive: chosen =
test-all: chosen = -m "not exhaustive"
test-all test-exhaustive: core $(VENV)/.test
	$(pytest) $(parallel) $(chosen) $(without_gpu)
	$(pytest) $(chosen) $(compiled)
	TRITON_INTERPRET=1 $(pytest) $(parallel) $(chosen) $(interpreted) $(also_interpreted)

# The oldest Triton that the kernels are for: ahead of time, and a little of its interpreter, which needs an older NumPy.
test-oldest-triton: core $(VENV)/.test $(OLDEST)
	PYTHONPATH=$(abspath $(OLDEST)) MAML_FAST_AOT=90 $(pytest) tests/test_triton_aot.py
	PYTHONPATH=$(abspath $(OLDEST)) TRITON_INTERPRET=1 $(pytest) -W ignore::DeprecationWarning $(interpreted) \
	    -k "[tanh] or [conv-2x3]"

bench: core $(VENV)/.bench
	$(bin)/maml-fast bench

# The package itself is installed without its core, and the core built in place: rebuilding is incremental.
core: $(VENV)/.base
	$(bin)/python setup.py --quiet build_ext --inplace

lint: $(VENV)/.dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run -Werror $(shell find csrc -type f)

types: $(VENV)/.dev
	$(bin)/mypy

sanitize: $(VENV)/.test
	PATH="$(abspath $(bin)):$$PATH" PARALLEL="$(parallel)" bash tests/sanitize.sh address $(PYTEST)
	PATH="$(abspath $(bin)):$$PATH" bash tests/sanitize.sh thread $(PYTEST)

format: $(VENV)/.dev
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(shell find csrc -type f)

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "maml_fast needs Python >= 3.10: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(pip) 'setuptools>=77' pybind11 cmake ninja
	MAML_FAST_NO_CORE=1 $(pip) -e .
	touch $@

$(VENV)/.test $(VENV)/.dev $(VENV)/.bench: $(VENV)/.base
	MAML_FAST_NO_CORE=1 $(pip) -e '.[$(subst .,,$(notdir $@))]'
	touch $@

$(OLDEST): $(VENV)/.base
	$(bin)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $@ triton==3.6.0 'numpy<2.4'

clean:
	rm -rf build maml_fast/_core*.so
