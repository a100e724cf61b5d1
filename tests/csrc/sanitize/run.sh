#!/usr/bin/env bash
# Builds each driver beside this script, with the torch-free C++ sources that its lines
# `// source: FILE` name (none where it includes headers only), under AddressSanitizer
# and UndefinedBehaviorSanitizer, and at the same time under ThreadSanitizer, and runs
# it. Any report, or a wrong result, ends with an error. Two checks of UBSan are left
# out: AddressSanitizer finds the same, and they take a sixth of the compiler's time.
#
#   tests/csrc/sanitize/run.sh [NAME...]     default: all drivers
#   CXX                                 compiler, default c++
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

# Before version 14, gcc's stack frames for this check are no multiples of 64 bytes,
# which vectors of AVX-512 must be.
old=$("${CXX:-c++}" -dM -E -x c++ /dev/null 2>/dev/null | awk '
  /__clang__/ { clang = 1 } $2 == "__GNUC__" { gcc = $3 }
  END { print !clang && gcc < 14 }')
export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=$((1 - old))
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1

run() { # driver, sanitizers
  local name sources program
  name=$(basename "$1" .cpp)
  program=$build/$name-$2
  sources=$(sed -n 's|^// source: ||p' "$1")
  # shellcheck disable=SC2086
  (cd "$root" && "${CXX:-c++}" -std=c++17 -O1 -g1 -Wall -Wextra -Werror -pthread \
    -fno-omit-frame-pointer -fno-sanitize-recover=all "-fsanitize=$2" \
    -fno-sanitize=null,object-size \
    -Icsrc "$1" $sources -o "$program")
  echo "$name under $2"
  "$program"
}

run_all() { # sanitizers
  for driver in "${drivers[@]}"; do run "$driver" "$1"; done
}

drivers=("$here"/*.cpp)
if (($#)); then drivers=("${@/#/$here/}") && drivers=("${drivers[@]/%/.cpp}"); fi
run_all address,undefined &
first=$!
run_all thread &
second=$!
wait "$first"
wait "$second"
