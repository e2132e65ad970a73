#!/usr/bin/env bash
# Tests with the C++ core built under AddressSanitizer and UndefinedBehaviorSanitizer: sanitize.sh [pytest arguments]
# The copy in build/sanitize leaves the ordinary core in maml_fast/ alone. Needs g++; python, cmake and ninja from PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
site=$root/build/sanitize/site
rm -rf "$site"
mkdir -p "$site"
cp -r maml_fast "$site/"
rm -f "$site"/maml_fast/_core*.so

cmake -S . -B build/sanitize/core -G Ninja --log-level=NOTICE -DMAML_FAST_SANITIZE=address,undefined \
    -DCMAKE_CXX_COMPILER=g++ -DPYBIND11_FINDPYTHON=ON -DPython_EXECUTABLE="$(command -v python)" \
    -Dpybind11_DIR="$(python -c 'import pybind11; print(pybind11.get_cmake_dir())')"
cmake --build build/sanitize/core --target _core
cp build/sanitize/core/_core*.so "$site/maml_fast/"

# Python itself is not instrumented: the runtime must come first, and libstdc++ with it so that exceptions are seen.
# Python and torch keep memory until the end, which is no leak of ours.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
# No detect_stack_use_after_return: its frames are aligned to 32 bytes, and stores of 64 to them crash.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1:detect_stack_use_after_return=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH=$site
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$site"
python -P - <<'PY'
import ctypes, os
from maml_fast import _core
assert os.getcwd() in _core.__file__, _core.__file__
ctypes.CDLL(_core.__file__).__asan_init  # AttributeError: not the instrumented core
print("sanitized core:", _core.__file__)
PY
# By default the tests that enter the core with every layer, size and number of threads, and only as far as they do.
if (($# == 0)); then
    for file in backends core_process errors isa properties; do set -- "$@" "$root/tests/test_$file.py"; done
    set -- "$@" -k "not (vmap or triton or reference- or -reference])" ${PARALLEL:-}
fi
# --capture=sys: a sanitizer's last words go to file descriptor 2 and would be lost in pytest's capture of it.
exec python -P -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider --capture=sys \
    -m "not slow and not no_sanitizer" "$@"
