"""5,000 lines, the same everywhere and always: scripts, code, emoji, numbers, whitespace, and what mixes them.

Tokenizers are compared on them; `make_tokenizers.py` writes what their peers make of them.
"""

from __future__ import annotations

import functools
import random

COUNT = 5000


def _items(text: str, separator: str | None = None) -> list[str]:
    return [item for item in text.split(separator) if item]


_WORDS = _items("""
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were her all she there would their we him been has when who will more no if out so said what up its about into than
them can only other new some could time these two may then do first any my now such like our over man me even most made
after also did many before must through back years where much your way well down should because each just those people
Mr how too little state good very make world still own see men work long get here between both life being under never
day same another know while last might us great old year off come since against go came right used take three
HTTP JSON API GPU naïve café résumé Zürich São Ångström don't I'll you've they're he'd I'm it's WE'LL DON'T
""")
_SCRIPTS = [
    _items(line)
    for line in _items(
        """
Всё счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему
الحمد لله رب العالمين السلام عليكم كيف حالك اليوم يا صديقي العزيز
שלום עולם מה שלומך היום אני אוהב לקרוא ספרים
我能吞下玻璃而不伤身体 今天天气很好 机器学习 人工智能 你好 世界 中文 繁體字 龍
私はガラスを食べられます それは私を傷つけません カタカナ ひらがな 東京 ｶﾀｶﾅ ー 々
나는 유리를 먹을 수 있어요 그래도 아프지 않아요 안녕하세요 대한민국
मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती नमस्ते दुनिया १२३
ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ สวัสดี ๑๒๓
Μπορώ να φάω σπασμένα γυαλιά χωρίς να πάθω τίποτα Ελλάδα ΑΘΗΝΑ ς
Tôi có thể ăn thủy tinh mà không hại gì Việt Nam đẹp
İstanbul'da güneşli bir gün ığüşöç IŞIK straße ẞ ǆ ǅ ﬁ ﬂ
Ⅷ ½ ² ³ ① ㈱ ㎏ ٠١٢٣ ௧௨ 𝟘𝟙𝟚 𝒜𝓑 𐍈 𒀀 ŉ ª º
""",
        "\n",
    )
]
_SCRIPTS.append(["e\u0301", "\u00e9", "n\u0303", "o\u0302", "A\u030a", "\u212b", "\u1100\u1161\u11a8", "\ufdfa"])
_EMOJI = _items("🙂 👍🏽 👨‍👩‍👧‍👦 🇩🇪 🇯🇵 ❤️ ❤ ☺️ 🏳️‍🌈 1️⃣ 🤷🏿‍♀️ ✨ 🔥 𓀀 ™ © ⚠️")
_CODE = _items(
    r"""def f(x: int) -> str:
    return f"{x!r:>10}"
for (int i = 0; i < n; ++i) {
		if (a[i] != b[j]) break;
}
#include <stdio.h>
<div class="x" id='y'>&nbsp;</div>
SELECT * FROM t WHERE a >= 10 AND b <> 'z';
x = [i**2 for i in range(10)]  # squares
{"key": [1, 2.5e-3, null, true]}
$ grep -rn "foo\|bar" ./src | head -20
https://example.com/a/b?c=d&e=f%20g#h
std::vector<std::pair<int, int>> v;
fn main() { println!("{:?}", vec![1, 2]); }
\begin{equation} E = mc^2 \end{equation}
|-----|:---:|** bold ** __init__ --flag=value a_b_c camelCaseWord SCREAMING_CASE
0xDEADBEEF 1_000_000 3.14159 10% $5.00 €9,99 №1
import numpy as np; np.einsum('ij,jk->ik', A, B)
user@example.org +1 (555) 010-9999 2024-02-29T23:59:59Z
C:\\Windows\\System32""",
    "\n",
)
_SPACE = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n ", "\t\t", "\u00a0", "\u3000", "\u2009", "\u200b"]
_SPACE += ["\u2028", "\x0b", "\x0c", "\x85"]
_PUNCTUATION = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…—–“”‘’«»¿¡、。！？・「」")
_PUNCTUATION += _items("... ?! 's 'S 'ſ 'll 'RE '' -> ==")
_PLANES = ((0x20, 0x7F), (0xA0, 0x250), (0x250, 0x2000), (0x2000, 0x3000), (0x3000, 0xD800), (0x1F300, 0x1FAFF))


@functools.cache
def lines() -> tuple[str, ...]:
    """The lines. None of them spells a special token of a known model."""
    rng = random.Random(20240229)

    def word() -> str:
        found = rng.choice(_WORDS)
        return rng.choice([found, found, found, found.upper(), found.capitalize(), found + rng.choice(_WORDS)])

    def characters() -> str:
        return "".join(chr(rng.randrange(*rng.choice(_PLANES))) for _ in range(rng.randint(1, 6)))

    kinds = [
        (0.42, word),
        (0.62, lambda: rng.choice(rng.choice(_SCRIPTS))),
        (0.70, lambda: str(rng.randrange(10 ** rng.randint(1, 12)))),
        (0.78, lambda: rng.choice(_PUNCTUATION) * rng.choice([1, 1, 1, 2, 3, 7])),
        (0.83, lambda: rng.choice(_EMOJI)),
        (0.90, lambda: rng.choice(_SPACE) * rng.randint(1, 5)),
        (0.96, characters),
        (1.00, lambda: rng.choice(_CODE)),
    ]

    def piece() -> str:
        drawn = rng.random()
        return next(make for share, make in kinds if drawn < share)()

    made = ["", *_CODE, *(" ".join(script) for script in _SCRIPTS), " ".join(_EMOJI), *_SPACE, *_PUNCTUATION]
    made += [space * count for space in _SPACE for count in (2, 3, 8, 31)]
    made += ["a" * 100, "9" * 50, "🙂" * 20, "\ud7ff\ue000\U0010ffff\x00"]
    while len(made) < COUNT:
        separator = rng.choice([" ", " ", " ", " ", "", rng.choice(_SPACE)])
        made.append(separator.join(piece() for _ in range(rng.randint(1, 14))))
    return tuple(made)
