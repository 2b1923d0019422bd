// Texts to token ids word by word: each distinct word is encoded once, by the tokenizer itself, and then looked up.
#include <algorithm>
#include <cstring>
#include <array>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "native.hpp"
#include "word_rules.hpp"

namespace py = pybind11;

namespace {

using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Spans = std::vector<std::vector<std::pair<int64_t, int64_t>>>;  // per text, in characters

uint64_t hash_of(std::string_view key) {
    constexpr uint64_t kFactor = 0x9E3779B97F4A7C15ull;
    const char* p = key.data();
    size_t n = key.size();
    uint64_t hash = n * kFactor, part = 0;
    for (; n > 8; p += 8, n -= 8) {
        std::memcpy(&part, p, 8);
        hash = (hash ^ part) * kFactor;
        hash ^= hash >> 29;
    }
    part = 0;
    for (size_t i = 0; i < n; ++i) part |= static_cast<uint64_t>(static_cast<uint8_t>(p[i])) << (8 * i);
    hash = (hash ^ part) * kFactor;
    return hash ^ (hash >> 29);
}

struct Word {
    uint64_t hash;
    size_t key, key_size;        // bytes of keys_
    size_t first = 0, size = 0;  // tokens of ids_
    size_t edges = 0;            // where its tokens start in edges_
    int64_t num_chars = 0;
    int known = 0;               // 1: its tokens, 2: their edges too; from when they are asked for
};

class WordTable {
public:
    // `cutting`: tokens that cut a text, with ids. `other`: tokens that may take more along; a text that holds one is
    // left to the tokenizer. Beyond `max_bytes` the table is emptied before the next texts.
    WordTable(int digits, bool lines, bool by_case, bool slashes, std::vector<std::pair<std::string, int32_t>> cutting,
              const std::vector<std::string>& other, size_t max_bytes)
        : rules_{digits, lines, by_case, slashes}, cutting_(std::move(cutting)), max_bytes_(max_bytes) {
        for (size_t i = 0; i < cutting_.size(); ++i) add(cutting_[i].first, static_cast<int64_t>(i));
        for (const auto& text : other) add(text, -1);
        clear();
    }

    // Ids of all texts, tokens of each text, and with `spans` a mask of the tokens from the one that holds the first
    // character of a span to the one that holds its last. `ask(texts, edges)` gives ids and counts of unknown words,
    // and with `edges` the first character and the one behind the last of each token.
    py::tuple encode(const py::list& texts, const py::function& ask, const std::vector<int32_t>& before,
                     const std::vector<int32_t>& after, const std::optional<Spans>& spans) {
        std::vector<std::string_view> views;
        for (const py::handle& text : texts) {
            Py_ssize_t size = 0;
            const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
            if (!data) throw py::error_already_set();
            views.emplace_back(data, static_cast<size_t>(size));
        }
        if (spans && spans->size() != views.size()) throw std::invalid_argument("spans must be as many as texts");
        std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
        {
            py::gil_scoped_release unlocked;
            lock.lock();
            scan(views, spans.has_value());
        }
        if (!unknown_.empty()) learn(ask, spans.has_value());
        py::array_t<int64_t> lengths(static_cast<py::ssize_t>(views.size()));
        int64_t* length = lengths.mutable_data();
        int64_t total = 0;
        for (size_t row = 0; row < views.size(); ++row) {
            length[row] = static_cast<int64_t>(before.size() + after.size());
            for (size_t i = ends_[row]; i < ends_[row + 1]; ++i) length[row] += words_[sequence_[i]].size;
            total += length[row];
        }
        Ids ids(total);
        std::optional<py::array_t<uint8_t>> mask;
        if (spans) mask.emplace(total);
        int32_t* out = ids.mutable_data();
        uint8_t* marks = mask ? mask->mutable_data() : nullptr;
        {
            py::gil_scoped_release unlocked;
            for (size_t row = 0; row < views.size(); ++row) {
                if (marks) marks = mark(row, (*spans)[row], marks, length[row]);
                out = std::copy(before.begin(), before.end(), out);
                for (size_t i = ends_[row]; i < ends_[row + 1]; ++i) {
                    const Word& word = words_[sequence_[i]];
                    out = std::copy_n(ids_.data() + word.first, word.size, out);
                }
                out = std::copy(after.begin(), after.end(), out);
            }
        }
        return py::make_tuple(ids, lengths, mask);
    }

    size_t size() const { return words_.size(); }

private:
    struct Added {
        std::string text;
        int64_t word;  // the word of a token that cuts, else -1
    };

    void add(const std::string& text, int64_t word) {
        if (!text.empty()) added_[static_cast<uint8_t>(text[0])].push_back({text, word});
    }

    void clear() {
        words_.clear(), keys_.clear(), ids_.clear(), edges_.clear(), unknown_.clear();
        slots_.assign(1 << 12, -1);
        for (const auto& [text, id] : cutting_) {  // their words are the first ones, in this order
            Word& word = words_[find(text)];
            word.first = ids_.size(), word.size = 1, word.edges = edges_.size(), word.known = 2;
            ids_.push_back(id);
            edges_.push_back({0, static_cast<int32_t>(word.num_chars)});
        }
    }

    size_t bytes() const {
        return words_.size() * sizeof(Word) + keys_.size() + ids_.size() * 4 + edges_.size() * 8 + slots_.size() * 4;
    }

    // The word of this text, new if need be.
    size_t find(std::string_view key) {
        const uint64_t hash = hash_of(key);
        size_t slot = hash & (slots_.size() - 1);
        for (; slots_[slot] >= 0; slot = (slot + 1) & (slots_.size() - 1)) {
            const Word& word = words_[slots_[slot]];
            if (word.hash == hash && word.key_size == key.size() &&
                std::memcmp(keys_.data() + word.key, key.data(), key.size()) == 0)
                return slots_[slot];
        }
        const size_t index = words_.size();
        Word word{hash, keys_.size(), key.size()};
        for (const char c : key) word.num_chars += (static_cast<uint8_t>(c) & 0xC0) != 0x80;
        words_.push_back(word);
        keys_.insert(keys_.end(), key.begin(), key.end());
        slots_[slot] = static_cast<int32_t>(index);
        if (words_.size() * 2 > slots_.size()) grow();
        return index;
    }

    void grow() {
        slots_.assign(slots_.size() * 2, -1);
        for (size_t i = 0; i < words_.size(); ++i) {
            size_t slot = words_[i].hash & (slots_.size() - 1);
            while (slots_[slot] >= 0) slot = (slot + 1) & (slots_.size() - 1);
            slots_[slot] = static_cast<int32_t>(i);
        }
    }

    void push(std::string_view key, bool edges) {
        const size_t index = find(key);
        Word& word = words_[index];
        if (word.known < 1 + edges) {
            word.known = 1 + edges;
            unknown_.push_back(index);
        }
        sequence_.push_back(static_cast<uint32_t>(index));
    }

    void scan(const std::vector<std::string_view>& texts, bool edges) {
        if (bytes() > max_bytes_) clear();
        sequence_.clear();
        ends_.assign(1, 0);
        for (const std::string_view text : texts) {
            if (!find_cuts(text)) {
                push(text, edges);
            } else {
                size_t from = 0;
                for (const auto& [position, word] : cuts_) {
                    scan_piece(text.substr(from, position - from), edges);
                    sequence_.push_back(static_cast<uint32_t>(word));
                    from = position + cutting_[word].first.size();
                }
                scan_piece(text.substr(from), edges);
            }
            ends_.push_back(sequence_.size());
        }
    }

    void scan_piece(std::string_view piece, bool edges) {
        const WordScanner scanner(piece, rules_);
        bool foreign = false;
        for (size_t p = 0, end = 0; p < piece.size(); p = end) {
            end = scanner.end_of_word(p, foreign);
            push(piece.substr(p, end - p), edges);
        }
    }

    // Where tokens cut the text; false if it holds one of the others.
    bool find_cuts(std::string_view text) {
        cuts_.clear();
        for (size_t p = 0; p < text.size();) {
            size_t next = p + 1;
            for (const Added& token : added_[static_cast<uint8_t>(text[p])]) {
                if (text.compare(p, token.text.size(), token.text) != 0) continue;
                if (token.word < 0) return false;
                cuts_.emplace_back(p, token.word);
                next = p + token.text.size();
            }
            p = next;
        }
        return true;
    }

    void learn(const py::function& ask, bool edges) {
        try {
            py::list texts;
            for (const size_t index : unknown_)
                texts.append(py::str(keys_.data() + words_[index].key, words_[index].key_size));
            const auto answer = ask(texts, edges).cast<py::tuple>();
            const auto ids = answer[0].cast<Ids>();
            const auto counts = answer[1].cast<py::array_t<int64_t, py::array::c_style | py::array::forcecast>>();
            const int64_t total = std::accumulate(counts.data(), counts.data() + counts.size(), int64_t{0});
            if (static_cast<size_t>(counts.size()) != unknown_.size() || total != ids.size())
                throw std::invalid_argument("the answer must have a count for each word, and as many ids");
            size_t first = ids_.size(), first_edge = edges_.size();
            ids_.insert(ids_.end(), ids.data(), ids.data() + ids.size());
            if (edges) {
                const auto found = answer[2].cast<Ids>();
                if (found.size() != 2 * total) throw std::invalid_argument("the answer must have two edges for each id");
                for (int64_t i = 0; i < total; ++i) edges_.emplace_back(found.data()[2 * i], found.data()[2 * i + 1]);
            }
            for (size_t i = 0; i < unknown_.size(); ++i) {
                Word& word = words_[unknown_[i]];
                word.first = first, word.edges = first_edge, word.size = static_cast<size_t>(counts.data()[i]);
                first += word.size, first_edge += word.size;
            }
            unknown_.clear();
        } catch (...) {
            clear();  // the words that were asked for are not known
            throw;
        }
    }

    // Fills the mask of a row; a span that no token starts ends the search, one that none ends reaches to the end.
    uint8_t* mark(size_t row, const std::vector<std::pair<int64_t, int64_t>>& spans, uint8_t* mask, int64_t length) {
        std::fill_n(mask, length, 0);
        starts_.clear();  // of each word: characters and tokens before it
        int64_t chars = 0, tokens = 0;
        for (size_t i = ends_[row]; i < ends_[row + 1]; ++i) {
            starts_.emplace_back(chars, tokens);
            chars += words_[sequence_[i]].num_chars, tokens += static_cast<int64_t>(words_[sequence_[i]].size);
        }
        const auto token_at = [&](int64_t position) -> int64_t {
            if (position < 0 || position >= chars) return -1;
            const auto found = std::upper_bound(starts_.begin(), starts_.end(), std::pair(position, INT64_MAX)) - 1;
            const Word& word = words_[sequence_[ends_[row] + (found - starts_.begin())]];
            const int64_t inside = position - found->first;
            for (size_t i = 0; i < word.size; ++i) {
                const auto [from, to] = edges_[word.edges + i];
                if (from <= inside && inside < to) return found->second + static_cast<int64_t>(i);
            }
            return -1;
        };
        for (const auto& [start, end] : spans) {
            const int64_t first = token_at(start), last = token_at(end - 1);
            if (first < 0) break;
            const int64_t stop = last > 0 ? last + 1 : length;
            if (stop > first) std::fill(mask + first, mask + stop, 1);
        }
        return mask + length;
    }

    WordRules rules_;
    std::vector<std::pair<std::string, int32_t>> cutting_;
    size_t max_bytes_;
    std::array<std::vector<Added>, 256> added_;
    std::mutex mutex_;
    std::vector<Word> words_;
    std::vector<char> keys_;
    std::vector<int32_t> slots_, ids_;
    std::vector<std::pair<int32_t, int32_t>> edges_;
    std::vector<uint32_t> sequence_;  // words of all texts of a call
    std::vector<size_t> ends_, unknown_;
    std::vector<std::pair<size_t, size_t>> cuts_;
    std::vector<std::pair<int64_t, int64_t>> starts_;
};

}  // namespace

void bind_words(py::module_& module) {
    py::class_<WordTable>(module, "WordTable")
        .def(py::init<int, bool, bool, bool, std::vector<std::pair<std::string, int32_t>>, std::vector<std::string>,
                      size_t>(),
             py::arg("digits"), py::arg("lines"), py::arg("by_case"), py::arg("slashes"), py::arg("cutting"),
             py::arg("other"), py::arg("max_bytes"))
        .def("encode", &WordTable::encode, py::arg("texts"), py::arg("ask"), py::arg("before"), py::arg("after"),
             py::arg("spans"))
        .def("__len__", &WordTable::size);
}
