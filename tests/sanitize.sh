#!/usr/bin/env bash
# Tests with the C++ core built under sanitizers: sanitize.sh [address|thread] [pytest arguments]
# address: AddressSanitizer and UndefinedBehaviorSanitizer. thread: ThreadSanitizer, on the thread pool's stress test and on
# races.py, which must find the race planted there and no other; with pytest arguments tests of the core instead.
# The copies in build/ leave the ordinary core in maml_fast/ alone. Needs g++; python, cmake and ninja from PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
kind=address
case ${1:-} in address | thread) kind=$1 && shift ;; esac
build=$root/build/sanitize/$kind
site=$build/site
rm -rf "$site"
mkdir -p "$site"
cp -r maml_fast "$site/"
rm -f "$site"/maml_fast/_core*.so

declare -A flags=([address]=address,undefined [thread]=thread) library=([address]=libasan.so [thread]=libtsan.so)
declare -A begins=([address]=__asan_init [thread]=__tsan_init)
kernels=(-DMAML_FAST_BASELINE=OFF)
if [[ $kind == thread ]]; then kernels=(-DMAML_FAST_BASELINE=ON); fi  # all are made of the same sources
cmake -S . -B "$build/core" -G Ninja --log-level=NOTICE -DMAML_FAST_SANITIZE="${flags[$kind]}" -DMAML_FAST_TESTS=ON "${kernels[@]}" \
    -DCMAKE_CXX_COMPILER=g++ -DPYBIND11_FINDPYTHON=ON -DPython_EXECUTABLE="$(command -v python)" \
    -Dpybind11_DIR="$(python -c 'import pybind11; print(pybind11.get_cmake_dir())')"
cmake --build "$build/core" --target thread_pool_test _core

# No detect_stack_use_after_return: its frames are aligned to 32 bytes, and stores of 64 to them crash.
# Python and torch keep memory until the end, which is no leak of ours.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1:detect_stack_use_after_return=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:abort_on_error=1:suppressions=$root/tests/tsan.supp
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$build/core/thread_pool_test" 1000
cp "$build"/core/_core*.so "$site/maml_fast/"

# Python itself is not instrumented: the runtime must come first, and libstdc++ with it so that exceptions are seen.
export LD_PRELOAD="$(g++ -print-file-name="${library[$kind]}") $(g++ -print-file-name=libstdc++.so)"
export PYTHONPATH=$site
cd "$site"
python -P - "${begins[$kind]}" <<'PY'
import ctypes, os, sys
from maml_fast import _core
assert os.getcwd() in _core.__file__, _core.__file__
getattr(ctypes.CDLL(_core.__file__), sys.argv[1])  # AttributeError: not the instrumented core
print("sanitized core:", _core.__file__)
PY
if [[ $kind == thread && $# == 0 ]]; then
    # Interceptors of locks and memory see what Python and PyTorch do; what else they do is not instrumented.
    export TSAN_OPTIONS=halt_on_error=1:abort_on_error=1:ignore_noninstrumented_modules=1
    if found=$(ulimit -c 0; python -P "$root/tests/races.py" --planted 2>&1) ||
        [[ $found != *"ThreadSanitizer: data race"* ]]; then
        echo "the planted race was not found: $found"
        exit 1
    fi
    exec python -P "$root/tests/races.py"
fi
# By default the tests that enter the core with every layer, size and number of threads, and only as far as they do.
if (($# == 0)); then
    for file in backends core_memory core_process draws errors isa lookups per_batch properties; do
        set -- "$@" "$root/tests/test_$file.py"
    done
    set -- "$@" -k "not (vmap or triton or reference- or -reference])" ${PARALLEL:-}
fi
# --capture=sys: a sanitizer's last words go to file descriptor 2 and would be lost in pytest's capture of it.
exec python -P -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider --capture=sys \
    -m "not slow and not no_sanitizer and not exhaustive" "$@"
