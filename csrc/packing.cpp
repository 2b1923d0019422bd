// Best-fit-decreasing plans over all rows of a dataset, and the copy of rows into packs.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/stl.h>

#include "native.hpp"

namespace py = pybind11;

namespace {

template <typename T>
using Values = py::array_t<T, py::array::c_style>;

// A set of integers below `size`, as a tree of 64-bit words: insert, erase and successor in O(log64 size).
class SpaceSet {
  public:
    explicit SpaceSet(int64_t size) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(size);
        } while (size > 1);
    }
    void insert(int64_t x) {
        for (auto& level : levels_) {
            level[x >> 6] |= uint64_t{1} << (x & 63);
            x >>= 6;
        }
    }
    void erase(int64_t x) {
        for (auto& level : levels_) {
            if (level[x >> 6] &= ~(uint64_t{1} << (x & 63))) return;
            x >>= 6;
        }
    }
    // The smallest member that is at least x, or -1.
    int64_t successor(int64_t x) const {
        for (size_t height = 0; height < levels_.size(); ++height) {
            if (static_cast<size_t>(x >> 6) >= levels_[height].size()) return -1;
            if (const uint64_t bits = levels_[height][x >> 6] >> (x & 63)) {
                x += __builtin_ctzll(bits);
                while (height--) x = (x << 6) | __builtin_ctzll(levels_[height][x]);
                return x;
            }
            x = (x >> 6) + 1;
        }
        return -1;
    }

  private:
    std::vector<std::vector<uint64_t>> levels_;
};

// A piece of a row: tokens [start, start + length).
struct Piece {
    int64_t start;
    int32_t row, length;
};

// The pieces to pack, in the order of their rows: one of each row, or with `split` as many as it takes.
std::vector<Piece> pieces_of(const int64_t* lengths, int64_t num_rows, int64_t capacity, bool split) {
    std::vector<Piece> pieces;
    pieces.reserve(num_rows);
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t start = 0; start < lengths[row]; start += capacity) {
            const int64_t length = std::min(capacity, lengths[row] - start);
            pieces.push_back({start, static_cast<int32_t>(row), static_cast<int32_t>(length)});
            if (!split) break;
        }
    return pieces;
}

// The pieces by falling length; equal lengths keep their order.
std::vector<Piece> longest_first(const std::vector<Piece>& pieces, int64_t capacity) {
    std::vector<int32_t> next(capacity + 2);
    std::vector<Piece> sorted(pieces.size());
    for (const Piece& piece : pieces) ++next[capacity - piece.length + 1];
    for (int64_t i = 0; i <= capacity; ++i) next[i + 1] += next[i];
    for (const Piece& piece : pieces) sorted[next[capacity - piece.length]++] = piece;
    return sorted;
}

// Bin of each piece: the fullest bin that still has room, of equal ones the one that waits longest. Sets `num_bins`.
std::vector<int32_t> best_fit(const std::vector<Piece>& pieces, int64_t capacity, int32_t& num_bins) {
    SpaceSet spaces(capacity + 1);
    std::vector<int32_t> first(capacity + 1, -1), last(capacity + 1, -1);  // queue of the bins with this space
    std::vector<int32_t> behind;                                           // the bin behind this one in its queue
    std::vector<int32_t> bin_of(pieces.size());
    num_bins = 0;
    for (size_t i = 0; i < pieces.size(); ++i) {
        int64_t space = spaces.successor(pieces[i].length);
        int32_t bin;
        if (space < 0) {
            bin = num_bins++;
            behind.push_back(-1);
            space = capacity;
        } else {
            bin = first[space];
            first[space] = behind[bin];
            if (first[space] < 0) spaces.erase(space);
        }
        bin_of[i] = bin;
        space -= pieces[i].length;
        if (space == 0) continue;
        behind[bin] = -1;
        if (first[space] < 0) {
            first[space] = bin;
            spaces.insert(space);
        } else {
            behind[last[space]] = bin;
        }
        last[space] = bin;
    }
    return bin_of;
}

// A permutation of 0..size-1 that depends on `seed` alone (Fisher-Yates on splitmix64).
std::vector<int32_t> permutation(int32_t size, uint64_t seed) {
    std::vector<int32_t> order(size);
    for (int32_t i = 0; i < size; ++i) order[i] = i;
    for (int32_t i = size - 1; i > 0; --i) {
        uint64_t z = (seed += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        std::swap(order[i], order[(z ^ (z >> 31)) % (static_cast<uint64_t>(i) + 1)]);
    }
    return order;
}

struct Plan {
    std::vector<Piece> pieces;   // in packed order
    std::vector<int64_t> packs;  // pack k holds pieces [packs[k], packs[k + 1])
};

Plan plan_best_fit(const int64_t* lengths, int64_t num_rows, int64_t capacity, bool split, const uint64_t* seed) {
    std::vector<Piece> pieces = pieces_of(lengths, num_rows, capacity, split);
    if (pieces.size() > INT32_MAX) throw std::invalid_argument("more than 2**31 - 1 pieces to pack");
    pieces = longest_first(pieces, capacity);
    int32_t num_bins = 0;
    const std::vector<int32_t> bin_of = best_fit(pieces, capacity, num_bins);

    std::vector<int32_t> place(num_bins);  // bin -> its place among the packs
    for (int32_t i = 0; i < num_bins; ++i) place[i] = i;
    if (seed) place = permutation(num_bins, *seed);
    Plan plan{std::vector<Piece>(pieces.size()), std::vector<int64_t>(num_bins + 1)};
    for (const int32_t bin : bin_of) ++plan.packs[place[bin] + 1];
    for (int32_t i = 0; i < num_bins; ++i) plan.packs[i + 1] += plan.packs[i];
    std::vector<int64_t> next(plan.packs.begin(), plan.packs.end() - 1);
    for (size_t i = 0; i < pieces.size(); ++i) plan.pieces[next[place[bin_of[i]]]++] = pieces[i];
    return plan;
}

// All tokens back to back, cut at every `capacity`.
Plan plan_wrapped(const int64_t* lengths, int64_t num_rows, int64_t capacity) {
    Plan plan{{}, {0}};
    int64_t space = capacity;
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t start = 0; start < lengths[row];) {
            const int64_t length = std::min(space, lengths[row] - start);
            plan.pieces.push_back({start, static_cast<int32_t>(row), static_cast<int32_t>(length)});
            start += length;
            space -= length;
            if (space) continue;
            plan.packs.push_back(static_cast<int64_t>(plan.pieces.size()));
            space = capacity;
        }
    if (space < capacity) plan.packs.push_back(static_cast<int64_t>(plan.pieces.size()));
    return plan;
}

// (row, start, length, packs) of the plan for rows of these lengths; `strategy` as in fastalign.data.packing.
py::tuple plan_packs(const Values<int64_t>& lengths, int64_t capacity, const std::string& strategy,
                     std::optional<uint64_t> seed) {
    if (lengths.size() > INT32_MAX) throw std::invalid_argument("more than 2**31 - 1 rows to pack");
    Plan plan;
    {
        py::gil_scoped_release unlocked;
        plan = strategy == "wrapped"
                   ? plan_wrapped(lengths.data(), lengths.size(), capacity)
                   : plan_best_fit(lengths.data(), lengths.size(), capacity, strategy == "bfd_split", seed ? &*seed : nullptr);
    }
    const auto size = static_cast<py::ssize_t>(plan.pieces.size());
    Values<int64_t> row(size), start(size), length(size), packs(static_cast<py::ssize_t>(plan.packs.size()));
    int64_t *rows = row.mutable_data(), *starts = start.mutable_data(), *sizes = length.mutable_data();
    std::copy(plan.packs.begin(), plan.packs.end(), packs.mutable_data());
    py::gil_scoped_release unlocked;
    for (py::ssize_t i = 0; i < size; ++i) {
        rows[i] = plan.pieces[i].row;
        starts[i] = plan.pieces[i].start;
        sizes[i] = plan.pieces[i].length;
    }
    py::gil_scoped_acquire locked;
    return py::make_tuple(row, start, length, packs);
}

// Copies items [start[i], start[i] + length[i]) of chunks[chunk[i]], one after the other, into `out`.
void gather(const std::vector<py::array>& chunks, const Values<int32_t>& chunk, const Values<int64_t>& start,
            const Values<int64_t>& length, py::array out) {
    const int64_t item = out.itemsize(), num_pieces = chunk.size();
    std::vector<const char*> data;
    std::vector<int64_t> sizes;
    for (const py::array& values : chunks) {
        if (values.itemsize() != item) throw std::invalid_argument("chunks and output differ in item size");
        data.push_back(static_cast<const char*>(values.data()));
        sizes.push_back(values.size());
    }
    if (start.size() != num_pieces || length.size() != num_pieces)
        throw std::invalid_argument("chunk, start and length must be equally long");
    const int32_t* chunk_of = chunk.data();
    const int64_t *from = start.data(), *count = length.data();
    char* to = static_cast<char*>(out.mutable_data());
    const char* end = to + out.size() * item;
    py::gil_scoped_release unlocked;
    for (int64_t i = 0; i < num_pieces; ++i) {
        const int32_t c = chunk_of[i];
        if (c < 0 || c >= static_cast<int32_t>(data.size()) || from[i] < 0 || count[i] < 0 ||
            from[i] + count[i] > sizes[c] || count[i] * item > end - to)
            throw std::out_of_range("piece " + std::to_string(i) + " lies outside its chunk or the output");
        std::memcpy(to, data[c] + from[i] * item, count[i] * item);
        to += count[i] * item;
    }
    if (to != end) throw std::out_of_range("the pieces do not fill the output");
}

}  // namespace

void bind_packing(py::module_& module) {
    module.def("plan_packs", &plan_packs, py::arg("lengths"), py::arg("capacity"), py::arg("strategy"), py::arg("seed"));
    module.def("gather", &gather, py::arg("chunks"), py::arg("chunk"), py::arg("start"), py::arg("length"), py::arg("out"));
}
