#!/bin/bash
# safetensors 0.8.0: safetensors.numpy.save of an array that is not contiguous stores other values, without a word.
#
# Guess: the values of the array, as numpy.save stores them; or an error, as safetensors.torch raises for such a tensor.
# What happens: the bytes are taken as they lie in memory, the shape as it is seen, so a transposed array comes back scrambled.
# Seen: [[0, 1], [2, 3], [4, 5]] for the transpose of [[0, 1, 2], [3, 4, 5]].
. "$(dirname "$0")/lib.sh"
install safetensors==0.8.0 numpy==2.4.6
run <<'P'
import numpy as np
from safetensors.numpy import load, save

array = np.arange(6, dtype=np.int64).reshape(2, 3).T
seen = load(save({"a": array}))["a"]
print(seen.tolist(), "for", array.tolist())
assert array.tolist() == [[0, 3], [1, 4], [2, 5]]
assert seen.tolist() == [[0, 1], [2, 3], [4, 5]], seen
P
