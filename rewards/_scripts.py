"""Scripts, words, sentences and languages of a text, by Unicode and small lists of words: no model and no data.

Everything here takes time in proportion to the text, whatever it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache

SCRIPTS = {
    "am": ["ETHIOPIC"], "ar": ["ARABIC"], "bg": ["CYRILLIC"], "bn": ["BENGALI"], "de": ["LATIN"], "el": ["GREEK"],
    "en": ["LATIN"], "es": ["LATIN"], "fa": ["ARABIC"], "fi": ["LATIN"], "fr": ["LATIN"], "gu": ["GUJARATI"],
    "he": ["HEBREW"], "hi": ["DEVANAGARI"], "hy": ["ARMENIAN"], "id": ["LATIN"], "it": ["LATIN"],
    "ja": ["CJK", "HIRAGANA", "KATAKANA"], "ka": ["GEORGIAN"], "km": ["KHMER"], "kn": ["KANNADA"], "ko": ["HANGUL"],
    "lo": ["LAO"], "ml": ["MALAYALAM"], "mr": ["DEVANAGARI"], "my": ["MYANMAR"], "ne": ["DEVANAGARI"], "nl": ["LATIN"],
    "pa": ["GURMUKHI"], "pl": ["LATIN"], "pt": ["LATIN"], "ru": ["CYRILLIC"], "sv": ["LATIN"], "sw": ["LATIN"],
    "ta": ["TAMIL"], "te": ["TELUGU"], "th": ["THAI"], "tr": ["LATIN"], "uk": ["CYRILLIC"], "ur": ["ARABIC"],
    "vi": ["LATIN"], "zh": ["CJK"],
}  # fmt: skip
"""Languages by their codes (ISO 639-1) and the scripts that they are written in, by the names of Unicode's letters."""

WORDS = {
    "ar": "في من على أن إلى هذا هذه التي الذي ما لا كان هو هي مع عن كل ذلك هناك يمكن و أو ثم لكن بعد",
    "bg": "и на да се от за не е са с че по това в как като ще но или при те най беше този тази много",
    "de": "der die und das ist nicht ein eine zu den mit von auf für sich dem des im es wir ich sie auch wie wird sind",
    "en": "the of and to a in is that it for was with as on be this are you not have by from or an they which but we",
    "es": "el la de que y en los las un una es se no por con para del su al lo como más pero está muy también son",
    "fa": "و در به از که این را است با آن برای یک خود تا بر هم می ها ما شما من او شود کرد دارد",
    "fi": "ja on ei se että oli hän mutta ovat kun niin myös joka tai sen olen minä kuin voi mitä tämä ole hyvin",
    "fr": "le la les de des et un une est que qui dans pour pas sur avec il elle nous vous je ne au aux ce cette du",
    "hi": "है के में की और का से को हैं यह पर एक नहीं भी ने कि जो तो हो था करने लिए कर रहा हम आप",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya kami adalah ke karena bisa ada mereka",
    "it": "il la di che e un una è per non con del della le gli sono nel alla dei lo si più ma anche come questo",
    "mr": "आहे आणि च्या या तो ती हे मध्ये आहेत होते की नाही एक त्या मी आम्ही पण करून साठी ला चे ची चा होता",
    "ne": "छ र को मा हो यो पनि लागि छन् गर्न थियो एक हुन्छ भने गरेको ले तर म हामी तपाईं सँग बाट भयो गर्ने त्यो",
    "nl": "de het een en van is dat niet in op te zijn met voor aan er maar om ook als bij dit heeft door over nog",
    "pl": "i w na nie się z do jest że to a o jak ale po co tak za od przez są dla być czy może jego oraz które bardzo",
    "pt": "o a de que e do da em um uma para é com não os as no na por mais dos como mas ao ele são você seu muito",
    "ru": "и в не на что я он с как это по но они к у из за то все так его она мы вы от же бы для был есть",
    "sv": "och i att det som en på är av för med den till inte har de ett om var jag vi kan men så från hon han detta",
    "sw": "na ya wa ni kwa katika za la kuwa hii hiyo yake kama cha huo watu sana lakini pia au hivyo yao wao mimi",
    "tr": "ve bir bu da de için ile çok ne ama gibi daha olarak olan var ben sen o biz kadar sonra en değil mi her",
    "uk": "і в не на що я він з як це по але вони до у та за так його вона ми ви від для був є цей які також",
    "ur": "کے میں کی ہے اور سے کا کو یہ نے پر کہ ہیں ایک بھی نہیں ہو تھا کر جو تو لیے اس وہ گیا ہم آپ",
    "vi": "và là của có không được cho một trong các với những người này đã để khi tôi từ đến như cũng về thì ở bạn",
}
"""The most frequent words of languages that share their script with others."""

LETTERS = {
    "bg": "ъщ", "ru": "ыэё", "uk": "іїєґ", "ur": "ٹڈڑںےہھ", "fa": "پژگچیک", "ar": "ةىيك", "mr": "ळ", "de": "ßäöü",
    "es": "ñ¿¡", "fr": "çœèêàù", "pl": "łąężśćźń", "pt": "ãõç", "vi": "ăđơưạảấầẩậắằặẻẽếềểễệỉịọỏốồổỗộớờởợụủứừửữựỳỹ",
    "tr": "ğışç", "sv": "åäö", "fi": "äö", "it": "èòàù",
}  # fmt: skip
"""Letters that tell some of them apart, each worth a tenth of a word."""

_UNSPACED = "぀-ヿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003134f฀-๿຀-໿က-႟ក-៿"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
# A run of signs is read from its beginning only, and never given back: a million of them cost a million steps.
_END = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]*_»]*+(?=\s|$)|[。！？．]++[」』”’）]*+")
_SPACED = re.compile(r"[^\s।,.!?;:\"'()،؟۔]+")
_TITLES = frozenset({
    "mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "vs", "gen", "col", "sgt", "capt", "lt", "rev", "hon", "no",
    "fig", "vol", "pp", "e.g", "i.e", "cf", "approx", "al", "dept", "est", "eq",
})  # fmt: skip
"""Abbreviations that a sentence goes on after."""
_ABBREVIATIONS = frozenset({"etc", "inc", "ltd", "co", "corp", "a.m", "p.m", "u.s", "u.k", "u.n", "e.u", "d.c", "ph.d"})
"""Abbreviations that a sentence may end with: it does where a capital letter or nothing follows."""


def words(text: str) -> list[str]:
    """Runs of letters and digits; of scripts without spaces every letter."""
    return _WORD.findall(text)


@lru_cache(maxsize=2**16)
def script_of(character: str) -> str | None:
    """The script of a letter, by the first word of its name in Unicode; None for anything else."""
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "").split()
    return None if not name else "LATIN" if name[0] in ("MODIFIER", "FEMININE", "MASCULINE", "FULLWIDTH") else name[0]


def scripts(text: str) -> Counter[str]:
    """Letters of each script."""
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        script = script_of(character)
        if script is not None:
            found[script] += count
    return found


def sentences(text: str) -> int:
    """How many sentences a text has.

    One ends with `.`, `!` or `?` before white space, or with their kin of East Asia; not behind a title or an initial
    (`Dr.`, `e.g.`, `J.`), nor behind another abbreviation before a small letter. What stands behind the last end is
    one, too, if it has a letter or a digit. Line ends end nothing.
    """
    return sum(1 for part in _parts(text) if any(map(str.isalnum, part)))


def _parts(text: str) -> Iterator[str]:
    start = 0
    for end in _END.finditer(text):
        if end[0][0] == "." and _goes_on(text, end.start(), end.end()):
            continue
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]


def _goes_on(text: str, stop: int, end: int) -> bool:
    """Whether a sentence goes on behind the full stop at `stop`."""
    before = text[max(0, stop - 12) : stop].split()
    written = before[-1].lstrip("(\"'“[*") if before and not text[stop - 1].isspace() else ""
    word = written.casefold()
    if word in _TITLES or (len(written) == 1 and written.isupper() and written != "I"):
        return True
    if word not in _ABBREVIATIONS:
        return False
    following = text[end : end + 12].lstrip()[:1]
    return bool(following) and not following.isupper()


def language_of(text: str) -> str | None:
    """The language that a text is written in, by its script and its most frequent words; None where they don't say.

    Languages with a script of their own need a letter of it; others at least one of their words or letters, and more
    than any other language.
    """
    scores = likely_languages(text)
    first, second = [*sorted(scores.values(), reverse=True), 0.0, 0.0][:2]
    return max(scores, key=lambda code: scores[code]) if first > second else None


def likely_languages(text: str) -> Mapping[str, float]:
    """Languages of the script that most letters are of, with how much speaks for each; only those above 0."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    letters = scripts(plain)
    if not letters:
        return {}
    if letters["HIRAGANA"] + letters["KATAKANA"]:
        letters["CJK"] += letters.pop("HIRAGANA", 0) + letters.pop("KATAKANA", 0)
        if letters.most_common(1)[0][0] == "CJK":
            return {"ja": 1.0}
    script = letters.most_common(1)[0][0]
    candidates = [code for code, written in SCRIPTS.items() if script in written and code != "ja"]
    if len(candidates) == 1:
        return {candidates[0]: 1.0}
    said = Counter(_SPACED.findall(plain))
    counts = Counter(plain)
    scores = {
        code: sum(said[word] for word in _frequent(code)) + 0.1 * sum(counts[c] for c in LETTERS.get(code, ""))
        for code in candidates
    }
    return {code: score for code, score in scores.items() if score}


@cache
def _frequent(code: str) -> frozenset[str]:
    return frozenset(WORDS.get(code, "").split())
