"""Triton kernels for the GPU, and the launchers that check their arguments.

Nothing here is imported on a machine without Triton: importers ask `available` first.

    launch     what every launch needs: dependent launch, padded sizes, one form
    quick      launches that cost the host little, and a layer's launches repeated for the others
    products   products of few rows with a weight, with what follows them in a layer
               (how they are summed: product_sums; the kernels: product_kernels, qkv_kernel)
    wide_gate_up  gate and up of a large weight for 17 to 128 rows, fed by the copy engine
    attention  attention over paged keys and values for any mix of rows
    shared     attention over a prefix that several requests share, read once for all of them
    pointwise  embedding, norms, SiLU·mul, qk-norm + rotary + store
    sample     argmax and draw
    rules      masks, bans, bias and penalties of single requests
    select     the passes over a row of logits that the next two share
    filters    thresholds of top-k and top-p
    top        log-probabilities and the greatest tokens
    step       inputs of a step and the verdict on its tokens, on the device
    lookup     drafts from the text itself or from a predicted output
    draft      what lies around the passes of a draft model
    prompt     attention of long chunks of prompts, fed by the copy engine
    decoder    a whole decoder forward, five kernels a layer for few rows
    many_rows  the layers of steps with many rows, between the library's products
    persistent  a whole forward of one row as one kernel

Every kernel is a function of its row alone, whatever stands in the other rows, and its sums have
one order whatever the number of rows: that is what makes a request's text independent of its
neighbours. Attention keeps to it at any size; the products up to MAX_ROWS rows, where they are used.
"""

from __future__ import annotations

import importlib.util


def available() -> bool:
    """True if Triton is installed. Whether it can compile for this machine is the platform's question."""
    return importlib.util.find_spec("triton") is not None
