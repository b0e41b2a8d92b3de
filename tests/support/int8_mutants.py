"""One-line mistakes in int8's two files; each must fail the checks that the true file passes."""

from __future__ import annotations

KERNEL_MUTANTS = {
    "scale of the largest magnitude alone": (
        "divisor_N = torch.where(spread_N, range_N, 1.0)",
        "divisor_N = hi_N.abs()",
    ),
    "254 levels": ("_LEVELS = 255.0", "_LEVELS = 254.0"),
    "rounded down": (".round() + _LOWEST", ".floor() + _LOWEST"),
    "centred on 127": ("_LOWEST = -128", "_LOWEST = -127"),
    "shift without the centre": ("lo_N + scale_N * -_LOWEST", "lo_N"),
    "a constant row by its range": ("range_N >= _SMALLEST_RANGE", "range_N >= -1.0"),
    "infinity hidden": ("finite_N = torch.isfinite(range_N)", "finite_N = ~torch.isnan(range_N)"),
    "not-a-number hidden": ("scale_N.masked_fill(~finite_N, torch.nan)", "scale_N"),
    "one scale for the whole weight": (
        "largest_O / LARGEST",
        "largest_O.max().expand(len(largest_O)) / LARGEST",
    ),
    "weights cut off": (".round().clamp(-LARGEST, LARGEST)", ".round().clamp(-100, 100)"),
    "column sums of floats": ("values_OI.sum(dim=1) * scale_O.double()", "weight_OI.sum(dim=1)"),
    "blocks overlap": ("slice(begin, begin + _EXACT_INPUTS)", "slice(begin, begin + _EXACT_INPUTS + 1)"),
    "first block only": ("acc_NO += F.linear", "acc_NO = F.linear"),
    "blocks too long for fp32": ("_EXACT_INPUTS = 1024", "_EXACT_INPUTS = 4096"),
    "bias scaled": (
        "scale_N[:, None] * (weight.scale_O * acc_NO.float()) + shifts_NO",
        "scale_N[:, None] * (weight.scale_O * acc_NO.float() + shifts_NO)",
    ),
    "shift forgotten": ("shift_N[:, None] * weight.sum_O + bias_O", "0.0 * shift_N[:, None] + bias_O"),
    "weight's scale forgotten": ("(weight.scale_O * acc_NO.float())", "acc_NO.float()"),
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
    "offset before the multiplier": (
        "x_NI * self.multiplier_I - self.offset_I",
        "(x_NI - self.offset_I) * self.multiplier_I",
    ),
    "offset added": ("x_NI * self.multiplier_I - self.offset_I", "x_NI * self.multiplier_I + self.offset_I"),
    "wide rows once": ("if wide_R.numel():", "if not wide_R.numel():"),
    "remainder replaces the row": ("scale_R, shift_R, weight, y_NO[wide_R])", "scale_R, shift_R, weight, self.bias_O)"),
    "remainder without the shift": (
        "q_NI[wide_R].float() + shift_N[wide_R, None]",
        "q_NI[wide_R].float() - shift_N[wide_R, None]",
    ),
    "narrow rows twice": ("(scale_N > self.refine_above)", "(scale_N < self.refine_above)"),
}
"""The same in engine/quantise.py."""
