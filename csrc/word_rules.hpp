// Where the words of a text end that byte-level tokenizers encode one by one: their regular expressions, for ASCII.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

// What a character is to the expressions; `kForeign` is a byte outside of ASCII, `kEnd` stands behind the text.
enum Kind : uint8_t { kUpper, kLower, kDigit, kSpace, kNewline, kOther, kForeign, kEnd };

inline const std::array<Kind, 256> kKinds = [] {
    std::array<Kind, 256> kinds{};
    for (int c = 0; c < 256; ++c) {
        kinds[c] = c >= 'A' && c <= 'Z'                                  ? kUpper
                   : c >= 'a' && c <= 'z'                                ? kLower
                   : c >= '0' && c <= '9'                                ? kDigit
                   : c == '\r' || c == '\n'                              ? kNewline
                   : c == ' ' || c == '\t' || c == '\v' || c == '\f'     ? kSpace
                   : c >= 128                                            ? kForeign
                                                                         : kOther;
    }
    return kinds;
}();

// How an expression differs from that of GPT-2: 's|'t|'re|'ve|'m|'ll|'d| ?L+| ?N+| ?[^\sLN]+|\s+(?!\S)|\s+
struct WordRules {
    int digits;      // longest word of digits; 0: any length, and one blank may stand before them
    bool lines;      // as cl100k: any one character before letters, and line ends belong to what is before them
    bool by_case;    // as o200k: capitals begin a word, and contractions belong to the word they follow
    bool slashes;    // a word of signs ends with [\r\n/]*
};

class WordScanner {
public:
    WordScanner(std::string_view text, const WordRules& rules) : text_(text), rules_(rules) {}

    // End of the word that begins at `p`. Where a byte outside of ASCII has a say (`foreign` is set), the end of the
    // first later word that certainly ends there: no expression joins a letter or digit and a blank behind it.
    size_t end_of_word(size_t p, bool& foreign) const {
        bool touched = false;
        const size_t end = kind(p) == kForeign ? p : match(p, touched);
        foreign = touched || kind(end) == kForeign;
        if (!foreign) return end;
        size_t q = p + 1;
        while (q < text_.size() && !(text_[q] == ' ' && kind(q - 1) <= kDigit)) ++q;
        return q;
    }

private:
    Kind kind(size_t p) const { return p < text_.size() ? kKinds[static_cast<uint8_t>(text_[p])] : kEnd; }
    bool letter(size_t p) const { return kind(p) <= kLower; }
    size_t skip(size_t p, Kind first, Kind last) const {
        while (kind(p) >= first && kind(p) <= last) ++p;
        return p;
    }

    size_t match(size_t p, bool& touched) const {
        const Kind first = kind(p);
        if (text_[p] == '\'' && !rules_.by_case)
            if (const size_t length = contraction(p)) return p + length;
        const size_t q = p + (text_[p] == ' ');
        if (rules_.lines) {
            const size_t from = p + (first == kSpace || first == kOther);
            if (letter(from)) return letters(from, touched);
        } else if (letter(q)) {
            return letters(q, touched);
        }
        if (rules_.digits && first == kDigit) {
            size_t end = p + 1;
            while (end < p + rules_.digits && kind(end) == kDigit) ++end;
            return end;
        }
        if (!rules_.digits && kind(q) == kDigit) return skip(q, kDigit, kDigit);
        if (kind(q) == kOther) {
            size_t end = skip(q, kOther, kOther);
            if (rules_.lines)
                while (kind(end) == kNewline || (rules_.slashes && end < text_.size() && text_[end] == '/')) ++end;
            return end;
        }
        return blanks(p, touched);
    }

    size_t letters(size_t p, bool& touched) const {
        if (!rules_.by_case) return skip(p, kUpper, kLower);
        const size_t end = skip(skip(p, kUpper, kUpper), kLower, kLower);
        if (kind(end) != kOther || text_[end] != '\'') return end;
        touched |= kind(end + 1) == kForeign;  // the long s is an s where case is ignored
        return end + contraction(end);
    }

    // \s*[\r\n]+|\s+(?!\S)|\s+: up to the last line end, else all but the blank before a word
    size_t blanks(size_t p, bool& touched) const {
        const size_t end = skip(p, kSpace, kNewline);
        touched |= kind(end) == kForeign;
        if (rules_.lines)
            for (size_t q = end; q > p; --q)
                if (kind(q - 1) == kNewline) return q;
        return kind(end) == kEnd || end == p + 1 ? end : end - 1;
    }

    // Length of 's, 't, 'm, 'd, 're, 've or 'll at p, or 0.
    size_t contraction(size_t p) const {
        const auto is = [&](size_t i, char c) {
            return i < text_.size() && (text_[i] == c || (rules_.lines && text_[i] == c - 'a' + 'A'));
        };
        if (is(p + 1, 's') || is(p + 1, 't') || is(p + 1, 'm') || is(p + 1, 'd')) return 2;
        const bool two = (is(p + 1, 'r') && is(p + 2, 'e')) || (is(p + 1, 'v') && is(p + 2, 'e')) ||
                         (is(p + 1, 'l') && is(p + 2, 'l'));
        return two ? 3 : 0;
    }

    std::string_view text_;
    WordRules rules_;
};
