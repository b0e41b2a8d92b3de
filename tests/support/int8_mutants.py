"""One-line mistakes in int8's two files; each must fail the checks that the true file passes."""

from __future__ import annotations

KERNEL_MUTANTS = {
    "one scale for the whole weight": (
        "largest_O / LARGEST",
        "largest_O.max().expand(len(largest_O)) / LARGEST",
    ),
    "weights cut off": (".round().clamp(-LARGEST, LARGEST)", ".round().clamp(-100, 100)"),
    "column sums of floats": ("values_OI.sum(dim=1) * scale_O.double()", "weight_OI.sum(dim=1)"),
    "blocks overlap": ("slice(begin, begin + _EXACT_INPUTS)", "slice(begin, begin + _EXACT_INPUTS + 1)"),
    "first block only": ("acc_NO += F.linear", "acc_NO = F.linear"),
    "blocks too long for fp32": ("_EXACT_INPUTS = 1024", "_EXACT_INPUTS = 4096"),
}
"""Name -> (the line's text, what takes its place), in kernels/quantised_linear.py."""

ENGINE_MUTANTS = {
    "bias without the means": ("biases[name] + weights[name] @ means[name]", "biases[name] + 0.0 * means[name].sum()"),
    "weights not scaled": ("weights[name] = weights[name] * scales[name]", "weights[name] = weights[name] * 1.0"),
    "queries scaled for values": ('weights["qkv"][2 * D :] /=', 'weights["qkv"][:D] /='),
    "values' bias not centred": ('biases["qkv"][2 * D :] - means["out"]', 'biases["qkv"][2 * D :]'),
    "the other norm's scales": (
        'given.feedforward_norm, means["fc1"], scales["fc1"]',
        'given.feedforward_norm, means["fc1"], scales["qkv"]',
    ),
    "norm's bias not centred": ("(norm.bias - mean_I) / scale_I", "norm.bias / scale_I"),
    "norm's weight multiplied": ("norm.weight / scale_I", "norm.weight * scale_I"),
    "wide rows once": ("if not wide_R.numel():", "if wide_R.numel():"),
    "remainder with the bias": ("torch.zeros_like(self.bias_O)", "self.bias_O"),
    "remainder of all that was given": ("exact_RI - rounded_RI", "exact_RI"),
    "remainder not moved": (
        "given.rows(wide_R), dtype=torch.float32, move=self.move",
        "given.rows(wide_R), dtype=torch.float32",
    ),
    "remainder of other rows": ("index_add_(0, wide_R,", "index_add_(0, wide_R.flip(0),"),
    "narrow rows twice": ("(rows.scale_N > self.refine_above)", "(rows.scale_N < self.refine_above)"),
    "move left out": (
        "None if self.times_I is None or self.minus_I is None else",
        "None if self.times_I is not None else",
    ),
}
"""The same in engine/quantise.py."""
