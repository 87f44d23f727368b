#!/bin/sh
# Stands in for a prover: a file that holds "by simp" is accepted, one that holds "by forever" never ends.
grep -q "by forever" "$1" && { sleep 600 & wait; }
grep -q "by simp" "$1" && exit 0
echo "Failed to finish proof in $(basename "$1")"
exit 1
