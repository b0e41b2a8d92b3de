#include "tokenise.hpp"

#include <cstddef>

namespace protnest {

std::vector<std::int64_t> token_offsets(const std::vector<std::string_view>& sequences) {
    std::vector<std::int64_t> offsets;
    offsets.reserve(sequences.size() + 1);
    offsets.push_back(0);
    for (const std::string_view sequence : sequences) {
        offsets.push_back(offsets.back() + static_cast<std::int64_t>(sequence.size()) + 2);
    }
    return offsets;
}

UnknownByte tokenise(const std::vector<std::string_view>& sequences, const std::array<std::uint8_t, 256>& table,
                     std::uint8_t bos, std::uint8_t eos, std::uint8_t* tokens_T) {
    std::uint8_t* out = tokens_T;
    for (std::size_t index = 0; index < sequences.size(); ++index) {
        const std::string_view sequence = sequences[index];
        *out++ = bos;
        // One flag per sequence, not a branch per byte: the search for the culprit runs only once something is wrong.
        bool unknown = false;
        for (std::size_t residue = 0; residue < sequence.size(); ++residue) {
            const std::uint8_t token = table[static_cast<unsigned char>(sequence[residue])];
            out[residue] = token;
            unknown |= token == kNotInAlphabet;
        }
        if (unknown) {
            std::size_t residue = 0;
            while (out[residue] != kNotInAlphabet) ++residue;
            return {static_cast<std::int64_t>(index), static_cast<std::int64_t>(residue)};
        }
        out += sequence.size();
        *out++ = eos;
    }
    return {};
}

}  // namespace protnest
