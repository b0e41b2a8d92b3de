// Letters to token ids: the C++ twin of protnest/kernels/tokenise.py, which holds the contract.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace protnest {

// The table's mark for a byte outside the alphabet.
inline constexpr std::uint8_t kNotInAlphabet = 255;

// Where a byte outside the alphabet was met; `sequence` is -1 when there is none.
struct UnknownByte {
    std::int64_t sequence = -1;
    std::int64_t residue = -1;  // from 0
};

// B + 1 offsets of sequences that each hold bos, their residues, eos.
std::vector<std::int64_t> token_offsets(const std::vector<std::string_view>& sequences);

// Writes every sequence's tokens back to back into `tokens_T`, which has room for token_offsets(...).back() of them.
// Stops at the first sequence that holds a byte outside the alphabet, and names that sequence's first such byte.
UnknownByte tokenise(const std::vector<std::string_view>& sequences, const std::array<std::uint8_t, 256>& table,
                     std::uint8_t bos, std::uint8_t eos, std::uint8_t* tokens_T);

}  // namespace protnest
