#!/bin/sh
# make sanitize: builds the native library with sanitizers and runs the kernels' and the threads' tests on it.
# Usage: tests/sanitize.sh [python]. Python is not instrumented, so the sanitizer's own library is loaded before it.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
jobs=$(nproc)
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1            # NumPy's threads are not ours to check
common=allocator_may_return_null=1:halt_on_error=1         # a test asks for more memory than there is
export ASAN_OPTIONS=$common:detect_leaks=0                 # Python frees little at its exit; test_leaks.py counts
export UBSAN_OPTIONS=$common:print_stacktrace=1
export TSAN_OPTIONS=$common:die_after_fork=0               # tests fork while threads run

check() {  # sanitizers, their library, tests …
  folder=$PWD/build/sanitize-${1%%,*}
  {
    cmake -S . -B "$folder" -DCMAKE_BUILD_TYPE=Release -DLAZULITE_SANITIZE="$1" &&
      cmake --build "$folder" --parallel "$jobs"
  } > "$folder.log" 2>&1 || { tail -40 "$folder.log"; exit 1; }
  library=$("${CXX:-c++}" -print-file-name="$2") runtime=$("${CXX:-c++}" -print-file-name=libstdc++.so.6)
  shift 2
  LAZULITE_LIB="$folder/liblazulite.so" LD_PRELOAD="$library $runtime" \
    setarch -R "$python" -m pytest -q -x -s -p no:cacheprovider "$@"   # -s: a report goes past pytest
}

mkdir -p build
check address,undefined libasan.so tests/cpu tests/array/test_threads.py tests/array/test_plan.py
check thread libtsan.so tests/cpu/test_runtime.py tests/cpu/test_linear.py tests/cpu/test_experts.py tests/array/test_threads.py tests/array/test_plan.py
