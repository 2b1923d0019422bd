"""How far results may lie from an fp64 oracle, per dtype of the inputs, each with its reason."""

import torch

# Per-token statistics of the head, absolute, in nats, for logits of size up to about 10.
# fp32: a logit of size 10 has a last bit of 1e-6, products of length up to 64 add a few of them.
# bf16: the product is rounded to bf16 on CPU: half of 2^-8 of a logit of size 10 for logp, averaged out elsewhere.
# fp16: the same with 2^-11.
STATISTICS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}

# Gradients of hidden, weight and bias: norm of the difference over the norm.
# fp32: probabilities carry the error of logits, a few 1e-6. bf16: logits, their gradient and the result are each
# rounded to 2^-9, and the rounding of the logits enters the probabilities absolutely. fp16: the same with 2^-12.
GRADIENTS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# Row kernels in C++ against the reference on the same logits: only the row's own arithmetic, fp32 inside.
ROW_STATISTICS = 1e-5  # a few last bits of a logit of size 30
ROW_GRADIENTS = {torch.float32: 1e-5, torch.bfloat16: 4e-3}  # bf16: one rounding to 2^-9 of each element
