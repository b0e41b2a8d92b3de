"""Broken twins of the distillation loss: which file, and what is changed in it."""

from __future__ import annotations

Mutants = dict[str, dict[str, str]]

CHUNKED_MUTANTS: Mutants = {
    "smoothing by untempered confidence": {
        "(1 - 1 / block.teacher.total_C1[:, 0])": "(1 - 1 / block._exps_1(block.teacher).sum(dim=-1))"
    },
    "entropy at the temperature": {
        "exps_CV = self._exps_1(self.teacher)": "exps_CV = self.teacher.exps_CV",
        "* self._temperature / total_C": "/ total_C",
    },
    "no uniform part in the loss": {"clamp(min=torch.finfo(first_CV.dtype).tiny)": "clamp(max=1e-37)"},
    "no uniform part in the gradient": {"(-soft_C * kept.eps / vocabulary)": "(-0.0 * soft_C)"},
    "target not shrunk in the loss": {"(1 - eps_C[:, None]) / teacher.total_C1": "1 / teacher.total_C1"},
    "target not shrunk in the gradient": {"(soft_C * (1 - kept.eps))": "soft_C"},
    "cross-entropy for the divergence": {
        "torch.log(first_CV, out=second_CV).sub_(student.shifted_CV)": (
            "torch.log(first_CV, out=second_CV).zero_().sub_(student.shifted_CV)"
        )
    },
    "divergence the other way": {
        "torch.log(first_CV, out=second_CV).sub_(student.shifted_CV).mul_(first_CV)": (
            "torch.log(first_CV, out=second_CV).neg_().add_(student.shifted_CV).mul_(student.exps_CV)"
        )
    },
    "hard loss at the temperature": {"total_C = self._exps_1(self.student)": "total_C = self.student.exps_CV"},
    "hard gradient at the temperature": {"self._exps_1(student),": "student.exps_CV,"},
    "one-hot missing": {"-hard_C[:, None])": "-0 * hard_C[:, None])"},
    "student not tempered": {"if temperature != 1:": "if False:"},
    "teacher's sum for the student's": {"soft_C[:, None] / student.total_C1": "soft_C[:, None] / teacher.total_C1"},
    "rows that do not count keep what was there": {"out_NV.masked_fill_(~used_N[:, None], 0)": "pass"},
}

ROWS_MUTANTS: Mutants = {
    "extremes over the batch": {
        "segment_of_rows(cu_seqlens, soft_N.numel())": "segment_of_rows(cu_seqlens, soft_N.numel()) * 0"
    },
    "ignored rows in the minimum": {"entropy_N.where(soft_N, torch.inf)": "entropy_N"},
    "ignored rows in the maximum": {"entropy_N.where(soft_N, -torch.inf)": "(entropy_N + 40.0 * ~soft_N)"},
    "weights from 0": {"0.5 + 0.5 * shares_N": "shares_N"},
    "weights upside down": {"0.5 + 0.5 * shares_N": "1.0 - 0.5 * shares_N"},
    "ignored rows weigh something": {".where(soft_N, 0.0)": ".where(soft_N, 0.5)"},
    "T squared missing": {
        "return temperature * scales[0]": "return scales[0] / temperature",
    },
    "T missing in the gradient": {
        "(1 - options.alpha) * options.temperature / soft_total": "(1 - options.alpha) / soft_total",
        "return temperature * scales[0]": "return temperature * temperature * scales[0]",
    },
    "divided by the sum of weights": {'weight_normalization == "weight"': 'weight_normalization == "count"'},
    "divided by all rows": {
        "soft_total = soft_N.sum().clamp(min=1)": "soft_total = soft_N.new_ones(soft_N.shape).sum()"
    },
    "hard loss divided by the soft rows": {"hard_total = hard_N.sum()": "hard_total = soft_N.sum()"},
    "alpha the other way round": {"options.alpha / hard_total": "(1 - options.alpha) / hard_total"},
}
"""In `kd_rows`, which every implementation on the CPU shares."""

TRITON_MUTANTS: Mutants = {
    "smoothing by untempered confidence": {
        "eps = smoothing * (1.0 - 1.0 / total)": "eps = smoothing * (1.0 - 1.0 / (total * total))"
    },
    "entropy at the temperature": {
        "exps_1 = tl.where(inside, exps_1, 0.0)": "exps_1 = exps",
        "exps_1 = tl.where(columns < V, _exp_1(t_exps, t_shifted, SQUARE), 0.0)": "exps_1 = t_exps",
    },
    "exponentials not squared": {"return exps * exps": "return exps"},
    "no uniform part in the loss": {
        "floor = eps / V\n    log_total": "floor = 0.0\n    log_total",
        "+ (eps / V)[:, None]": "",
    },
    "no uniform part in the gradient": {
        "floor = soft * eps / V": "floor = 0.0",
        "+ (soft * eps / V)[:, None]": "",
    },
    "target not shrunk in the gradient": {"soft * (1.0 - eps) /": "soft /"},
    "maximum not corrected in the divergence": {"- mass * (fall * inverse_T)": ""},
    "sums not rescaled to the new maximum": {"s_total * tl.exp(fall * inverse_T)": "s_total"},
    "entropy not rescaled to the new maximum": {"(t_product + fall * t_total_1) * rescale": "t_product * rescale"},
    "lanes beyond the vocabulary count": {
        "exps = tl.where(inside, tl.exp(s_shifted * inverse_T), 0.0)": "exps = tl.exp(s_shifted * inverse_T)",
        "s_exps = tl.where(columns < V, tl.exp(s_shifted * inverse_T), 0.0)": "s_exps = tl.exp(s_shifted * inverse_T)",
    },
    "hard loss at the temperature": {
        "tl.log(total_s_1) - (own": "tl.log(total_s) - (own",
        "tl.log(total_s_1) - own": "tl.log(total_s) - own",
    },
    "one-hot missing": {
        "gradient -= tl.where(begin + columns == label, hard, 0.0)": "pass",
        "gradient -= tl.where(columns == label[:, None], hard[:, None], 0.0)": "pass",
    },
    "last column not written": {
        "gradient.to(out_ptr.dtype.element_ty), mask=inside)": (
            "gradient.to(out_ptr.dtype.element_ty), mask=begin + columns < V - 1)"
        ),
        "mask=there[:, None] & (columns < V))": "mask=there[:, None] & (columns < V - 1))",
    },
    "rows that do not count are not written": {
        "tl.store(out_ptr + begin + columns, zeros, mask=begin + columns < V)": "pass",
        "mask=there[:, None] & (columns < V))": "mask=used[:, None] & (columns < V))",
    },
    "extremes over all rows before, too": {
        "if UNCERTAINTY:\n        for begin in range(first, last, BLOCK)": (
            "if UNCERTAINTY:\n        for begin in range(0, last, BLOCK)"
        ),
    },
    "ignored rows in the minimum": {
        'tl.where(soft, entropy, float("inf"))': 'tl.where(rows < last, entropy, float("inf"))'
    },
    "weights from 0": {"0.5 + 0.5 * (entropy - low) * inverse_span": "(entropy - low) * inverse_span"},
    "T squared missing": {"loss = temperature * soft_scale": "loss = soft_scale / temperature"},
    "T missing in the gradient": {
        "(1.0 - alpha) * temperature / soft_total": "(1.0 - alpha) / soft_total",
        "loss = temperature * soft_scale": "loss = temperature * temperature * soft_scale",
    },
    "divided by the sum of weights": {"(1 if BY_WEIGHT else 2)": "1", "0.5 if BY_WEIGHT else 1.0": "0.5"},
    "hard loss divided by the soft rows": {"hard_rows += tl.load(own + 4": "hard_rows += tl.load(own + 2"},
}
"""In `gpu.kd_loss`."""

CPP_MUTANTS: Mutants = {
    "exponential's series wrong in its fifth term": {"series * r + 1.0f / 24": "series * r + 1.0f / 25"},
    "ln 2 in one part": {"x - n * 0.693359375f) + n * 2.12194440e-4f": "x - n * 0.693359375f)"},
    "logarithm's series wrong in its second term": {"series * square + 1.0f / 3": "series * square + 1.0f / 4"},
    "largest number missed": {"z[v] > max ? z[v] : max": "z[v] > max + 50.0f ? z[v] : max"},
    "NaN not looked for": {"return {max, probe == 0.0f}": "return {max, true}"},
    "exponentials not squared": {"? e * e :": "? e :"},
    "last stretch left out": {
        "for (std::int64_t begin = 0; begin < V; begin += kStretch)": (
            "for (std::int64_t begin = 0; begin == 0 || begin + kStretch <= V; begin += kStretch)"
        )
    },
    "smoothing by untempered confidence": {
        "(1 - 1 / of_teacher.total)": "(1 - 1 / (of_teacher.total * of_teacher.total))"
    },
    "no uniform part in the loss": {
        "const float target = exps[v] * scale + floor;": "const float target = exps[v] * scale;"
    },
    "no uniform part in the gradient": {"* teacher_scale + floor": "* teacher_scale"},
    "target not shrunk in the gradient": {"soft * (1 - eps) /": "soft /"},
    "entropy at the temperature": {"if (Product) product += e_1 * x;": "if (Product) product += e * x;"},
    "hard loss at the temperature": {"std::log(of_student.total_1)": "std::log(of_student.total)"},
    "one-hot missing": {"if (hard != 0) out[in.labels[row]] -= hard;": ""},
    "rows that do not count keep what was there": {"std::fill_n(out, V, 0.0f);": ""},
}
"""In csrc/kd_loss.cpp."""
