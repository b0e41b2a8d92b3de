// protnest.kernels._C: binds the C++ twins to NumPy. Arguments are validated in Python, once for both twins; the checks
// here only keep a wrong call from touching memory that is not its own.
#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cached_attention.hpp"
#include "kd_loss.hpp"
#include "level.hpp"
#include "next_token.hpp"
#include "plan_batches.hpp"
#include "rotary_attention.hpp"
#include "row_passes.hpp"
#include "tokenise.hpp"
#include "top_rows.hpp"

namespace py = pybind11;

namespace {

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
using Integers = py::array_t<std::int64_t, py::array::c_style>;

Integers to_array(const std::vector<std::int64_t>& values) {
    return Integers(static_cast<py::ssize_t>(values.size()), values.data());
}

// (tokens_T, cu_seqlens_B1, sequence, residue): the last two, from 0, name the first fault and are -1 without one; an
// item that is not bytes has residue -1. A tuple, because its items cannot be swapped while the lock is released.
py::tuple tokenise(const py::tuple& sequences, const Bytes& table, std::uint8_t bos, std::uint8_t eos) {
    if (table.size() != 256) throw py::value_error("table must hold 256 entries");
    std::array<std::uint8_t, 256> entries;
    std::copy_n(table.data(), entries.size(), entries.begin());

    std::vector<std::string_view> views;
    views.reserve(sequences.size());
    for (const py::handle sequence : sequences) {
        if (!PyBytes_Check(sequence.ptr())) {
            return py::make_tuple(Bytes(0), Integers(0), static_cast<std::int64_t>(views.size()), -1);
        }
        views.emplace_back(PyBytes_AS_STRING(sequence.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(sequence.ptr())));
    }
    const std::vector<std::int64_t> offsets = protnest::token_offsets(views);
    Bytes tokens_T(static_cast<py::ssize_t>(offsets.back()));
    std::uint8_t* out = tokens_T.mutable_data();
    protnest::UnknownByte fault;
    {
        const py::gil_scoped_release release;
        fault = protnest::tokenise(views, entries, bos, eos, out);
    }
    return py::make_tuple(tokens_T, to_array(offsets), fault.sequence, fault.residue);
}

// (order, batch_offsets).
py::tuple plan_batches(const Integers& lengths, std::int64_t max_tokens) {
    if (lengths.ndim() != 1) throw py::value_error("lengths must have one dimension");
    if (max_tokens < 1) throw py::value_error("max_tokens must be at least 1");
    const std::int64_t n = lengths.size();
    const std::int64_t* in = lengths.data();
    if (std::any_of(in, in + n, [](std::int64_t length) { return length < 0; })) {
        throw py::value_error("lengths must be at least 0");
    }
    Integers order(static_cast<py::ssize_t>(n));
    std::int64_t* out = order.mutable_data();
    std::vector<std::int64_t> offsets;
    {
        const py::gil_scoped_release release;
        offsets = protnest::plan_batches(in, n, max_tokens, out);
    }
    return py::make_tuple(order, to_array(offsets));
}

using Floats = py::array_t<float>;
using Flags = py::array_t<bool, py::array::c_style>;

// A table of floats whose rows are contiguous.
protnest::Rows rows_of(const Floats& table, py::ssize_t rows, py::ssize_t vocabulary) {
    const bool fits = table.ndim() == 2 && table.shape(0) == rows && table.shape(1) == vocabulary;
    if (!fits || (vocabulary > 1 && table.strides(1) != sizeof(float)) || table.strides(0) % sizeof(float) != 0) {
        throw py::value_error("logits must share one shape and have contiguous rows");
    }
    return {table.data(), table.strides(0) / static_cast<py::ssize_t>(sizeof(float))};
}

// The first six of kd_rows.RowScalars, from an (S, N) whose rows are contiguous.
protnest::RowScalars scalars_of(Floats& kept, py::ssize_t rows) {
    if (kept.ndim() != 2 || kept.shape(0) < 6 || kept.shape(1) != rows || kept.strides(1) != sizeof(float)) {
        throw py::value_error("kept must have shape (6 or more, rows) and contiguous rows");
    }
    const auto row = [&](py::ssize_t index) { return kept.mutable_data(index, 0); };
    return {row(0), row(1), row(2), row(3), row(4), row(5)};
}

template <typename Array>
void expect_size(const Array& array, py::ssize_t rows) {
    if (array.ndim() != 1 || array.size() != rows || !(array.flags() & py::array::c_style)) {
        throw py::value_error("expected one contiguous entry a row");
    }
}

// (first student's row, first teacher's row) that is not finite, -1 without one. Fills kept, losses and, where
// `with_entropy`, entropy.
py::tuple kd_loss_forward(const Floats& student, const Floats& teacher, const Integers& labels, const Flags& soft,
                          const Flags& hard, float temperature, float smoothing, bool with_entropy, int threads,
                          Floats& kept, Floats& soft_loss, Floats& hard_loss, Floats& entropy) {
    const py::ssize_t rows = student.shape(0), vocabulary = student.shape(1);
    const protnest::Rows s = rows_of(student, rows, vocabulary), t = rows_of(teacher, rows, vocabulary);
    expect_size(labels, rows), expect_size(soft, rows), expect_size(hard, rows);
    expect_size(soft_loss, rows), expect_size(hard_loss, rows), expect_size(entropy, rows);
    const protnest::RowScalars scalars = scalars_of(kept, rows);
    const protnest::KDOptions options{rows, vocabulary, temperature, smoothing, with_entropy, threads};
    float *soft_out = soft_loss.mutable_data(), *hard_out = hard_loss.mutable_data();
    float* entropy_out = entropy.mutable_data();
    protnest::NotFinite bad{};
    {
        const py::gil_scoped_release release;
        bad = protnest::kd_loss_forward(options, s, t, labels.data(), soft.data(), hard.data(), scalars, soft_out,
                                        hard_out, entropy_out);
    }
    return py::make_tuple(bad.student, bad.teacher);
}

// First row of `used` that is not finite, or -1. Fills entropy of the rows of `used`.
std::int64_t entropies(const Floats& teacher, const Flags& used, int threads, Floats& entropy) {
    const py::ssize_t rows = teacher.shape(0), vocabulary = teacher.shape(1);
    const protnest::Rows t = rows_of(teacher, rows, vocabulary);
    expect_size(used, rows), expect_size(entropy, rows);
    const protnest::KDOptions options{rows, vocabulary, 1.0f, 0.0f, true, threads};
    float* out = entropy.mutable_data();
    const py::gil_scoped_release release;
    return protnest::entropies(options, t, used.data(), out);
}

// Fills out, which may be student.
void kd_loss_gradient(Floats& out, const Floats& student, const Floats& teacher, const Integers& labels, Floats& kept,
                      const Floats& soft, const Floats& hard, float temperature, int threads) {
    const py::ssize_t rows = student.shape(0), vocabulary = student.shape(1);
    const protnest::Rows s = rows_of(student, rows, vocabulary), t = rows_of(teacher, rows, vocabulary);
    const protnest::Rows target = rows_of(out, rows, vocabulary);
    expect_size(labels, rows), expect_size(soft, rows), expect_size(hard, rows);
    const protnest::RowScalars scalars = scalars_of(kept, rows);
    const protnest::KDOptions options{rows, vocabulary, temperature, 0.0f, false, threads};
    float* data = out.mutable_data();
    const py::gil_scoped_release release;
    protnest::kd_loss_gradient(options, data, target.stride, s, t, labels.data(), scalars, soft.data(), hard.data());
}

// What is contiguous and holds `size` elements of `itemsize` bytes.
void expect_block(const py::array& array, py::ssize_t size, py::ssize_t itemsize) {
    if (array.size() != size || array.itemsize() != itemsize || !(array.flags() & py::array::c_style)) {
        throw py::value_error("an array has not the size, the dtype or the layout that the others ask for");
    }
}

// The numbers of an array that may be None; null where it is.
const float* floats_or_null(const py::handle& array, py::ssize_t size) {
    if (array.is_none()) return nullptr;
    if (!py::isinstance<py::array>(array)) throw py::type_error("numbers come as an array or as None");
    const py::array numbers = py::reinterpret_borrow<py::array>(array);
    expect_block(numbers, size, sizeof(float));
    return static_cast<const float*>(numbers.data());
}

// (values, bias, steps, sums, scale, shift) of N rows and C columns: bf16 values come as 16-bit integers, integers have
// all six, and others None from the third on. The caller keeps the arrays.
protnest::Product product_of(const py::tuple& parts, py::ssize_t N, py::ssize_t C) {
    if (parts.size() != 6) throw py::value_error("a product has six parts");
    if (!py::isinstance<py::array>(parts[0])) throw py::type_error("a product's values are an array");
    const py::array values = parts[0];
    const char kind = values.dtype().kind();
    const bool integers = kind == 'i' && values.itemsize() == 4, narrow = values.itemsize() == 2;
    if (!integers && !narrow && !(kind == 'f' && values.itemsize() == 4)) {
        throw py::value_error("a product holds fp32, bf16 or int32");
    }
    expect_block(values, N * C, values.itemsize());
    const auto of_columns = [&](std::size_t index) { return floats_or_null(parts[index], C); };
    const protnest::Product product{values.data(),
                                    integers ? protnest::Left::integers
                                             : narrow ? protnest::Left::bf16 : protnest::Left::fp32,
                                    of_columns(1), of_columns(2), of_columns(3),
                                    floats_or_null(parts[4], N), floats_or_null(parts[5], N)};
    const bool has_all = product.bias_C && product.steps_C && product.sums_C && product.scale_N && product.shift_N;
    const bool has_any = product.steps_C || product.sums_C || product.scale_N || product.shift_N;
    if (integers ? !has_all : has_any) throw py::value_error("integers come with all five numbers, others with bias alone");
    return product;
}

// (values, scale, shift): levels where the values are of eight bits, else scale and shift are None.
protnest::Target target_of(const py::tuple& parts, py::ssize_t N, py::ssize_t C) {
    if (parts.size() != 3) throw py::value_error("a target has three parts");
    if (!py::isinstance<py::array>(parts[0])) throw py::type_error("a target's values are an array");
    py::array values = parts[0];
    expect_block(values, N * C, values.itemsize());
    switch (values.itemsize()) {
        case 4: return {protnest::Taken::fp32, values.mutable_data(), nullptr, nullptr};
        case 2: return {protnest::Taken::bf16, values.mutable_data(), nullptr, nullptr};
        case 1: break;
        default: throw py::value_error("a target is fp32, bf16 or int8");
    }
    if (C < 1) throw py::value_error("levels need at least one column");
    if (!py::isinstance<py::array>(parts[1]) || !py::isinstance<py::array>(parts[2])) {
        throw py::value_error("levels come with arrays for scale and shift");
    }
    py::array scale = parts[1], shift = parts[2];
    expect_block(scale, N, sizeof(float)), expect_block(shift, N, sizeof(float));
    return {protnest::Taken::levels, values.mutable_data(), static_cast<float*>(scale.mutable_data()),
            static_cast<float*>(shift.mutable_data())};
}

// x += product, where there is one; then, where weight is not None, the LayerNorm of x into the target.
void add_norm(Floats& x, const py::object& product, const py::object& weight, const py::object& bias, float eps,
              const py::object& target, const std::string& level, int threads) {
    if (x.ndim() != 2) throw py::value_error("x must have two dimensions");
    const py::ssize_t N = x.shape(0), C = x.shape(1);
    expect_block(x, N * C, sizeof(float));
    const protnest::Product added = product.is_none() ? protnest::Product{} : product_of(product, N, C);
    const protnest::Norm norm{floats_or_null(weight, C), floats_or_null(bias, C), eps};
    if (weight.is_none() != bias.is_none() || weight.is_none() != target.is_none()) {
        throw py::value_error("weight, bias and target come together");
    }
    const protnest::Target to = target.is_none() ? protnest::Target{} : target_of(target, N, C);
    const protnest::Level chosen = protnest::level_named(level);
    float* data = x.mutable_data();
    const py::gil_scoped_release release;
    protnest::add_norm(N, C, data, added, norm, chosen, threads, to);
}

void bias_gelu(py::ssize_t N, py::ssize_t C, const py::tuple& product, const py::object& times, const py::object& minus,
               const py::tuple& target, const std::string& level, int threads) {
    const protnest::Product from = product_of(product, N, C);
    const float *times_C = floats_or_null(times, C), *minus_C = floats_or_null(minus, C);
    if (times.is_none() != minus.is_none()) throw py::value_error("times and minus come together");
    const protnest::Target to = target_of(target, N, C);
    const protnest::Level chosen = protnest::level_named(level);
    const py::gil_scoped_release release;
    protnest::bias_gelu(N, C, from, times_C, minus_C, chosen, threads, to);
}

void quantise_rows(const Floats& x, const py::tuple& target, const std::string& level, int threads) {
    if (x.ndim() != 2) throw py::value_error("x must have two dimensions");
    const py::ssize_t N = x.shape(0), C = x.shape(1);
    expect_block(x, N * C, sizeof(float));
    const protnest::Target to = target_of(target, N, C);
    if (to.taken != protnest::Taken::levels) throw py::value_error("the target must be levels");
    const protnest::Level chosen = protnest::level_named(level);
    const float* data = x.data();
    const py::gil_scoped_release release;
    protnest::quantise_rows(N, C, data, chosen, threads, to);
}

void top_rows(const Floats& rows, std::int64_t first, const Floats& queries, py::array& scores, py::array& numbers,
              const std::string& level, int threads) {
    if (rows.ndim() != 2 || queries.ndim() != 2 || scores.ndim() != 2 || rows.shape(1) != queries.shape(1)) {
        throw py::value_error("rows, queries and scores must have two dimensions, rows and queries the same width");
    }
    const py::ssize_t N = rows.shape(0), K = rows.shape(1), Q = queries.shape(0), k = scores.shape(1);
    if (k < 1 || scores.shape(0) != Q) throw py::value_error("scores must be (queries, k)");
    expect_block(rows, N * K, sizeof(float)), expect_block(queries, Q * K, sizeof(float));
    expect_block(scores, Q * k, sizeof(float)), expect_block(numbers, Q * k, sizeof(std::int64_t));
    const protnest::Level chosen = protnest::level_named(level);
    const float *of_rows = rows.data(), *of_queries = queries.data();
    const protnest::BestRows best{k, static_cast<float*>(scores.mutable_data()),
                                  static_cast<std::int64_t*>(numbers.mutable_data())};
    const py::gil_scoped_release release;
    protnest::top_rows(N, K, Q, of_rows, first, of_queries, best, chosen, threads);
}

// Rows of each sequence lie in it.
void expect_rows(const Integers& rows, const Integers& cu_rows, const std::int32_t* ends, std::int64_t sequences) {
    if (cu_rows.size() != sequences + 1 || cu_rows.data()[0] != 0 || cu_rows.data()[sequences] != rows.size()) {
        throw py::value_error("cu_rows does not describe the rows of these sequences");
    }
    for (std::int64_t b = 0; b < sequences; ++b) {
        const std::int64_t first = cu_rows.data()[b], last = cu_rows.data()[b + 1];
        if (last < first || last > rows.size()) throw py::value_error("cu_rows falls, or rises beyond the rows");
        for (std::int64_t r = first; r < last; ++r) {
            if (rows.data()[r] < ends[b] || rows.data()[r] >= ends[b + 1]) {
                throw py::value_error("a row lies outside of its sequence");
            }
        }
    }
}

// With `rows`, places of tokens in the batch, and `cu_rows`, where each sequence's begin, of these tokens alone.
void rotary_attention(const py::tuple& qkv, const Floats& cos, const Floats& sin, const py::array& cu_seqlens,
                      std::int64_t heads, const std::string& level, bool pairs, int threads, py::array& out,
                      const std::optional<Integers>& rows, const std::optional<Integers>& cu_rows) {
    if (out.ndim() != 2) throw py::value_error("out must have two dimensions");
    const py::ssize_t width = out.shape(1);
    // The kernel reads four floats at a time from each half of a head.
    if (heads < 1 || width % (2 * heads) != 0 || width / heads < 8) {
        throw py::value_error("width must be heads times an even head width of at least 8");
    }
    const py::ssize_t K = width / heads;
    expect_block(cu_seqlens, cu_seqlens.size(), sizeof(std::int32_t));
    const std::int64_t sequences = cu_seqlens.size() - 1;
    const auto* ends = static_cast<const std::int32_t*>(cu_seqlens.data());
    if (sequences < 0 || ends[0] != 0) throw py::value_error("cu_seqlens ends elsewhere");
    for (std::int64_t b = 0; b < sequences; ++b) {
        if (ends[b + 1] < ends[b] || ends[b + 1] - ends[b] > cos.shape(0)) {
            throw py::value_error("cu_seqlens falls, or a sequence is longer than the tables");
        }
    }
    const py::ssize_t tokens = rows ? ends[sequences] : out.shape(0);
    const protnest::Product product = product_of(qkv, tokens, 3 * width);
    if (ends[sequences] != tokens) throw py::value_error("cu_seqlens ends elsewhere");
    if (product.left == protnest::Left::bf16 && product.bias_C) throw py::value_error("bf16 has its bias already");
    const py::ssize_t queries = rows ? rows->size() : tokens;
    expect_block(out, queries * width, product.left == protnest::Left::bf16 ? 2 : 4);
    expect_block(cos, cos.shape(0) * (K / 2), sizeof(float)), expect_block(sin, cos.size(), sizeof(float));
    if (rows.has_value() != cu_rows.has_value()) throw py::value_error("rows and cu_rows go together");
    if (rows) expect_rows(*rows, *cu_rows, ends, sequences);
    const protnest::AttentionInput input{product,   cos.data(), sin.data(),
                                         ends,      sequences,  heads,
                                         K,         rows ? rows->data() : nullptr,
                                         cu_rows ? cu_rows->data() : nullptr};
    const protnest::Level chosen = protnest::level_named(level);
    const protnest::Factors factors = pairs ? protnest::Factors::pairs : protnest::Factors::wide;
    void* to = out.mutable_data();
    const py::gil_scoped_release release;
    protnest::rotary_attention(input, chosen, factors, threads, to);
}

// Writes into the cache and into out. Slots and lengths are checked here, where reading them costs least.
void cached_attention(const py::tuple& qkv, py::array& keys, py::array& values, const Integers& slots,
                      const Integers& lengths, const std::string& level, int threads, py::array& out) {
    if (keys.ndim() != 4) throw py::value_error("keys must have four dimensions");
    const py::ssize_t S = keys.shape(0), H = keys.shape(1), P = keys.shape(2), K = keys.shape(3), B = slots.size();
    if (H < 1 || K < 1 || K % protnest::kHeadWidths != 0) {
        throw py::value_error("heads must be some, and as wide as a multiple of 8");
    }
    const bool narrow = keys.itemsize() == 2;
    expect_block(keys, keys.size(), narrow ? 2 : 4), expect_block(values, keys.size(), narrow ? 2 : 4);
    expect_block(slots, B, sizeof(std::int64_t)), expect_block(lengths, B, sizeof(std::int64_t));
    const protnest::Product product = product_of(qkv, B, 3 * H * K);
    if (product.left == protnest::Left::bf16 && product.bias_C) throw py::value_error("bf16 has its bias already");
    expect_block(out, B * H * K, product.left == protnest::Left::bf16 ? 2 : 4);
    std::vector<py::ssize_t> owners(S, -1);
    for (py::ssize_t b = 0; b < B; ++b) {
        const std::int64_t slot = slots.data()[b], length = lengths.data()[b];
        if (slot < 0 || slot >= S || length < 0 || length >= P) {
            throw py::value_error("sequence " + std::to_string(b) + ": place " + std::to_string(length) + " of slot " +
                                  std::to_string(slot) + ", but there are " + std::to_string(P) + " places of " +
                                  std::to_string(S) + " slots");
        }
        if (owners[slot] >= 0) {
            throw py::value_error("sequences " + std::to_string(owners[slot]) + " and " + std::to_string(b) +
                                  " share slot " + std::to_string(slot));
        }
        owners[slot] = b;
    }
    const protnest::CacheInput input{product, narrow ? protnest::Stored::bf16 : protnest::Stored::fp32,
                                     keys.mutable_data(), values.mutable_data(), slots.data(), lengths.data(), B, H, K, P};
    const protnest::Level chosen = protnest::level_named(level);
    void* to = out.mutable_data();
    const py::gil_scoped_release release;
    protnest::cached_attention(input, chosen, threads, to);
}

// Optional penalties and limits come as the numbers that do nothing: penalty 1, top_k V, top_p 1.
void next_token(const py::tuple& logits, const py::array& seen, const Integers& slots, const py::array& sizes,
                const Integers& room, const py::array& may_end, const py::array& uniform, std::int64_t end,
                float repetition_penalty, double temperature, std::int64_t top_k, double top_p, const std::string& level,
                int threads, py::array& chosen, py::array& log_p) {
    const py::ssize_t B = slots.size(), V = sizes.size(), S = seen.ndim() == 2 ? seen.shape(0) : 0;
    if (end < 0 || end >= V) throw py::value_error("the end is no token");
    if (top_k < 1 || top_k > V) throw py::value_error("top_k must be from 1 to all tokens");
    if (!(temperature > 0) || !(top_p > 0) || !(repetition_penalty > 0)) {
        throw py::value_error("temperature, top_p and repetition_penalty must be above 0");
    }
    const protnest::Product product = product_of(logits, B, V);
    expect_block(seen, S * V, 1), expect_block(sizes, V, sizeof(std::int32_t)), expect_block(room, B, sizeof(std::int64_t));
    expect_block(may_end, B, 1), expect_block(uniform, B, sizeof(double));
    expect_block(chosen, B, sizeof(std::int64_t)), expect_block(log_p, B, sizeof(double));
    for (py::ssize_t b = 0; b < B; ++b) {
        if (slots.data()[b] < 0 || slots.data()[b] >= S) {
            throw py::value_error("sequence " + std::to_string(b) + ": slot " + std::to_string(slots.data()[b]) +
                                  ", but there are " + std::to_string(S));
        }
    }
    const protnest::NextTokenInput input{product,
                                         static_cast<const std::uint8_t*>(seen.data()),
                                         slots.data(),
                                         static_cast<const std::int32_t*>(sizes.data()),
                                         room.data(),
                                         static_cast<const std::uint8_t*>(may_end.data()),
                                         static_cast<const double*>(uniform.data()),
                                         B,
                                         V,
                                         end,
                                         repetition_penalty,
                                         temperature,
                                         top_k,
                                         top_p};
    const protnest::Level level_chosen = protnest::level_named(level);
    auto* to = static_cast<std::int64_t*>(chosen.mutable_data());
    auto* nats = static_cast<double*>(log_p.mutable_data());
    const py::gil_scoped_release release;
    protnest::next_token(input, level_chosen, threads, to, nats);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ twins of protnest.kernels; their contracts are in protnest/kernels/*.py.";
    module.def("tokenise", &tokenise, py::arg("sequences"), py::arg("table").noconvert(), py::arg("bos"),
               py::arg("eos"));
    module.def("best_level", [] { return protnest::name_of(protnest::best_level()); });
    module.def("rotary_attention", &rotary_attention, py::arg("qkv").noconvert(), py::arg("cos").noconvert(),
               py::arg("sin").noconvert(), py::arg("cu_seqlens").noconvert(), py::arg("heads"), py::arg("level"),
               py::arg("pairs"), py::arg("threads"), py::arg("out").noconvert(), py::arg("rows") = py::none(),
               py::arg("cu_rows") = py::none());
    module.def("cached_attention", &cached_attention, py::arg("qkv").noconvert(), py::arg("keys").noconvert(),
               py::arg("values").noconvert(), py::arg("slots").noconvert(), py::arg("lengths").noconvert(),
               py::arg("level"), py::arg("threads"), py::arg("out").noconvert());
    module.def("next_token", &next_token, py::arg("logits").noconvert(), py::arg("seen").noconvert(),
               py::arg("slots").noconvert(), py::arg("sizes").noconvert(), py::arg("room").noconvert(),
               py::arg("may_end").noconvert(), py::arg("uniform").noconvert(), py::arg("end"),
               py::arg("repetition_penalty"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
               py::arg("level"), py::arg("threads"), py::arg("chosen").noconvert(), py::arg("log_p").noconvert());
    module.def("add_norm", &add_norm, py::arg("x").noconvert(), py::arg("product"), py::arg("weight"), py::arg("bias"),
               py::arg("eps"), py::arg("target"), py::arg("level"), py::arg("threads"));
    module.def("bias_gelu", &bias_gelu, py::arg("rows"), py::arg("columns"), py::arg("product"), py::arg("times"),
               py::arg("minus"), py::arg("target"), py::arg("level"), py::arg("threads"));
    module.def("quantise_rows", &quantise_rows, py::arg("x").noconvert(), py::arg("target"), py::arg("level"),
               py::arg("threads"));
    module.def("top_rows", &top_rows, py::arg("rows").noconvert(), py::arg("first"), py::arg("queries").noconvert(),
               py::arg("scores").noconvert(), py::arg("numbers").noconvert(), py::arg("level"), py::arg("threads"));
    module.def("plan_batches", &plan_batches, py::arg("lengths").noconvert(), py::arg("max_tokens"));
    module.def("kd_loss_forward", &kd_loss_forward, py::arg("student").noconvert(), py::arg("teacher").noconvert(),
               py::arg("labels").noconvert(), py::arg("soft").noconvert(), py::arg("hard").noconvert(),
               py::arg("temperature"), py::arg("smoothing"), py::arg("entropy_too"), py::arg("threads"),
               py::arg("kept").noconvert(), py::arg("soft_loss").noconvert(), py::arg("hard_loss").noconvert(),
               py::arg("entropy").noconvert());
    module.def("entropies", &entropies, py::arg("teacher").noconvert(), py::arg("used").noconvert(),
               py::arg("threads"), py::arg("entropy").noconvert());
    module.def("kd_loss_gradient", &kd_loss_gradient, py::arg("out").noconvert(), py::arg("student").noconvert(),
               py::arg("teacher").noconvert(), py::arg("labels").noconvert(), py::arg("kept").noconvert(),
               py::arg("soft").noconvert(), py::arg("hard").noconvert(), py::arg("temperature"), py::arg("threads"));
}
