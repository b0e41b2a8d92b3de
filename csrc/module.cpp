// protnest.kernels._C: binds the C++ twins to NumPy. Arguments are validated in Python, once for both twins; the checks
// here only keep a wrong call from touching memory that is not its own.
#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "plan_batches.hpp"
#include "tokenise.hpp"

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

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ twins of protnest.kernels; their contracts are in protnest/kernels/*.py.";
    module.def("tokenise", &tokenise, py::arg("sequences"), py::arg("table").noconvert(), py::arg("bos"),
               py::arg("eos"));
    module.def("plan_batches", &plan_batches, py::arg("lengths").noconvert(), py::arg("max_tokens"));
}
