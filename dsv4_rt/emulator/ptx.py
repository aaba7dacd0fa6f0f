"""PTX text to functions and variables.

One regular expression cuts the text into tokens; module-level statements are read at once, function bodies when first
used, because a module of several megabytes is usually loaded for one kernel. `.file` and `.debug_str` follow the code
in what NVRTC emits, so line information is resolved when a message is written, not here.

One grammar, one file: splitting module level from bodies would only pass the tokens around.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field

from dsv4_rt.emulator.ir import (
    TYPES,
    Address,
    Function,
    Instr,
    Loc,
    Not,
    Number,
    Operand,
    Pair,
    Reg,
    Sink,
    Special,
    Sym,
    Var,
    Vector,
)
from dsv4_rt.errors import EmulatorError, UnsupportedInstruction

_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<string>"[^"]*")
      | (?P<float>\d+\.\d*(?:[eE][+-]?\d+)?)
      | (?P<word>[.\w$%]+(?:::[\w.$]+)*)
      | (?P<mark>[{}()\[\],;:@!|+\-<>=])""",
    re.VERBOSE | re.DOTALL,
)
_NUMBER = re.compile(
    r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?(?!\w)|\d+\.\d*\S*"
)
_LINKAGE = frozenset({".visible", ".extern", ".weak", ".common"})
_NUMBERED = frozenset(
    ".maxntid .reqntid .minnctapersm .maxnctapersm .maxnreg .reqnctapercluster .maxclusterrank".split()
)
_SPACES = frozenset({".global", ".const", ".shared", ".local", ".param"})
SPECIAL = frozenset(
    """tid.x tid.y tid.z ntid.x ntid.y ntid.z ctaid.x ctaid.y ctaid.z nctaid.x nctaid.y nctaid.z laneid warpid nwarpid
    smid nsmid gridid clock clock_hi clock64 globaltimer globaltimer_lo globaltimer_hi lanemask_lt lanemask_le
    lanemask_gt lanemask_ge lanemask_eq clusterid.x clusterid.y clusterid.z nclusterid.x nclusterid.y
    nclusterid.z cluster_ctaid.x cluster_ctaid.y cluster_ctaid.z cluster_nctaid.x cluster_nctaid.y
    cluster_nctaid.z cluster_ctarank cluster_nctarank is_explicit_cluster dynamic_smem_size total_smem_size
    aggr_smem_size envreg1 envreg2 reserved_smem_offset_begin reserved_smem_offset_end
    reserved_smem_offset_cap""".split()
)


def _parse_number(word: str) -> Number:
    low = word.lower()
    if low.startswith("0f"):
        return Number(int(word[2:], 16), 32)
    if low.startswith("0d"):
        return Number(int(word[2:], 16), 64)
    if "." in word:
        return Number(struct.unpack("<Q", struct.pack("<d", float(word)))[0], 64)
    low = low.rstrip("u")
    if low.startswith(("0x", "0b")):
        return Number(int(low, 0))
    return Number(int(low, 8 if low.startswith("0") and len(low) > 1 else 10))


@dataclass
class Ptx:
    """A parsed module. `body(name)` parses a function's body on first use."""

    text: str
    version: str = ""
    target: str = ""
    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Var] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)
    strings: dict[str, str] = field(default_factory=dict)  # labels of .debug_str: names of inlined functions
    bodies: dict[str, tuple[int, int]] = field(default_factory=dict)  # token ranges not parsed yet
    aliases: dict[str, str] = field(default_factory=dict)  # .alias: another name -> the function's own
    parser: Parser | None = None

    def body(self, name: str) -> Function:
        """The function with its body parsed. Raises KeyError for a name that is only declared."""
        function = self.functions[name]
        span = self.bodies.pop(name, None)
        if span is not None and self.parser is not None:
            self.parser.parse_body(function, *span)
        return function

    def resolve(self, name: str) -> str:
        """A function's own name, for an alias of it."""
        return self.aliases.get(name, name)

    def defined(self, name: str) -> bool:
        return name in self.bodies or (name in self.functions and bool(self.functions[name].instrs))

    def line_text(self, line: int) -> str:
        return self.text.split("\n")[line - 1].strip() if line else ""


def parse(text: str) -> Ptx:
    """Parse a module. Raises EmulatorError for text that is not PTX, UnsupportedInstruction for unknown directives."""
    text = text.rstrip("\0")
    return Parser(text).parse_module()


class Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.words: list[str] = []
        self.starts: list[int] = []
        at = 0
        for token in _TOKEN.finditer(text):
            if token.start() != at:
                break
            at = token.end()
            if token.lastgroup != "skip":
                word, start = token.group(), token.start()
                while (dot := word.find(".", 1)) > 0 and word[0] == ".":  # `.reg.b16`: no space between directives
                    self.words.append(word[:dot])
                    self.starts.append(start)
                    word, start = word[dot:], start + dot
                self.words.append(word)
                self.starts.append(start)
        if at != len(text):
            line = text.count("\n", 0, at) + 1
            raise EmulatorError(f"PTX line {line}: cannot read {text[at : at + 20]!r}")
        self.words.append("")
        self.starts.append(len(text))
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.at = 0
        self.module = Ptx(text, parser=self)

    def line(self, at: int | None = None) -> int:
        return bisect_right(self.newlines, self.starts[self.at if at is None else at]) + 1

    def next(self) -> str:
        word = self.words[self.at]
        self.at += 1
        return word

    def take(self, word: str) -> bool:
        if self.words[self.at] == word:
            self.at += 1
            return True
        return False

    def expect(self, word: str) -> None:
        found = self.next()
        if found != word:
            raise EmulatorError(f"PTX line {self.line(self.at - 1)}: expected {word!r}, found {found!r}")

    def integer(self) -> int:
        sign = -1 if self.take("-") else 1
        word = self.next()
        if not _NUMBER.fullmatch(word):
            raise EmulatorError(f"PTX line {self.line(self.at - 1)}: expected a number, found {word!r}")
        return sign * _parse_number(word).value

    def rest_of_line(self) -> list[str]:
        line = self.line(self.at - 1)
        found = []
        while self.words[self.at] and self.line() == line:
            found.append(self.next())
        return found

    def unknown(self, word: str, at: int) -> UnsupportedInstruction:
        line = self.line(at)
        return UnsupportedInstruction(
            f"directive {word} is not implemented by the emulator\n  PTX line {line}: {self.module.line_text(line)}"
        )

    # Module level.

    def parse_module(self) -> Ptx:
        while word := self.next():
            begin = self.at - 1
            if word in _LINKAGE:
                continue
            if word == ".version":
                self.module.version = self.next()
            elif word == ".target":
                self.module.target = self.next()
                while self.take(","):
                    self.next()
            elif word == ".address_size":
                if self.integer() != 64:
                    raise EmulatorError("only 64-bit PTX is supported")
            elif word in (".entry", ".func"):
                self.function(word == ".entry")
            elif word in _SPACES:
                for var in self.variable(word[1:]):
                    self.module.variables[var.name] = var
            elif word == ".file":
                number = self.integer()
                self.module.files[number] = self.next().strip('"')
                while self.take(","):
                    self.integer()
            elif word == ".section":
                self.section()
            elif word == ".pragma":
                self.rest_of_line()
            elif word == ".alias":
                alias = self.next()
                self.expect(",")
                self.module.aliases[alias] = self.next()
            elif word == ".loc":
                self.loc()
            elif word != ";":
                raise self.unknown(word, begin)
        return self.module

    def section(self) -> None:
        name = self.next()
        self.expect("{")
        label, data = "", bytearray()
        while not self.take("}"):
            word = self.next()
            if not word:
                raise EmulatorError("PTX ends inside a .section")
            if self.take(":"):
                label, data = word, bytearray()
            elif word == ".b8" and name == ".debug_str":
                data.append(self.integer() & 255)
                while self.take(","):
                    data.append(self.integer() & 255)
                if label:
                    self.module.strings[label] = data.split(b"\0")[0].decode(errors="replace")

    def function(self, entry: bool) -> None:
        line = self.line(self.at - 1)
        returns = self.formals() if self.words[self.at] == "(" else []
        function = Function(self.next(), entry, line, returns=returns)
        if self.words[self.at] == "(":
            function.params = self.formals()
        while True:
            word = self.next()
            begin = self.at - 1
            if word == ";":
                self.module.functions.setdefault(function.name, function)
                return
            if word == "{":
                break
            if word in (".noreturn", ".explicitcluster", ".blocksareclusters"):
                function.directives[word[1:]] = []
            elif word == ".pragma":
                self.next()
                self.expect(";")
            elif word in _NUMBERED:
                values = [self.integer()]
                while self.take(","):
                    values.append(self.integer())
                function.directives[word[1:]] = values
            else:
                raise self.unknown(word, begin)
        self.module.functions[function.name] = function
        first, depth = self.at, 1
        while depth:
            word = self.next()
            if not word:
                raise EmulatorError(f"PTX line {line}: the body of {function.name} does not end")
            depth += (word == "{") - (word == "}")
        self.module.bodies[function.name] = (first, self.at - 1)

    def formals(self) -> list[Var]:
        self.expect("(")
        found = []
        while not self.take(")"):
            self.expect(".param")
            found.append(self.variable("param", one=True)[0])
            self.take(",")
        return found

    def variable(self, space: str, one: bool = False) -> list[Var]:
        align, ty, vector = 0, "", 1
        while self.words[self.at].startswith("."):
            begin, word = self.at, self.next()
            if word == ".align":
                align = self.integer()
            elif word == ".ptr":
                continue
            elif word[1:] in TYPES:
                ty = word[1:]
            elif word in (".v2", ".v4"):
                vector = int(word[2:])
            elif word in _SPACES and space == "param":
                continue  # `.param .u64 .ptr .global .align 16 name`: the space pointed to
            else:
                raise self.unknown(word, begin)
        if not ty:
            raise EmulatorError(f"PTX line {self.line()}: a variable without a type")
        width = TYPES[ty][0] // 8 * vector
        if one and space == "param" and ".ptr" in self.words[self.at - 4 : self.at]:
            align = 0  # .align after .ptr speaks of what is pointed to
        found = []
        while True:
            name, count = self.next(), 1
            while self.take("["):
                if self.take("]"):
                    count = 0
                else:
                    count *= self.integer()
                    self.expect("]")
            var = Var(name, space, width * count, align or width)
            if self.take("="):
                self.initialiser(var, width)
                if not var.size:
                    var.size = sum(size for _, size, _ in var.initial)
            found.append(var)
            if one:
                return found
            if self.take(";"):
                return found
            self.expect(",")

    def initialiser(self, var: Var, width: int) -> None:
        offset, depth = 0, 0
        while True:
            word = self.words[self.at]
            if word == "{":
                depth += 1
                self.at += 1
            elif word == "}":
                depth -= 1
                self.at += 1
            elif word == ",":
                if depth == 0:
                    return
                self.at += 1
            elif word == ";":
                return
            else:
                value: Number | Sym
                if word == "generic":
                    self.at += 1
                    self.expect("(")
                    value = Sym(self.next())
                    self.expect(")")
                elif word == "-" or _NUMBER.fullmatch(word):
                    sign = -1 if self.take("-") else 1
                    value = _parse_number(self.next())
                    value = Number(sign * value.value, value.float_bits)
                    if self.words[self.at] == "(":
                        raise self.unknown(f"{word}(...) in an initialiser", self.at)
                else:
                    value = Sym(self.next())
                if isinstance(value, Sym) and self.words[self.at] in "+-":
                    self.take("+")
                    value = Sym(value.name, self.integer())
                var.initial.append((offset, width, value))
                offset += width

    def loc(self) -> Loc:
        """`file line column[, function_name label[+offset], inlined_at file line column]`, all on one line."""
        words = self.rest_of_line()
        file, line, column = (int(word) for word in words[:3])
        function, outer = "", None
        if "function_name" in words:
            function = words[words.index("function_name") + 1]
        if "inlined_at" in words:
            at = words.index("inlined_at") + 1
            outer = Loc(int(words[at]), int(words[at + 1]), int(words[at + 2]))
        return Loc(file, line, column, function, outer)

    # Function bodies.

    def parse_body(self, function: Function, first: int, last: int) -> None:
        saved, self.at = self.at, first
        names: list[dict[str, Reg | Var]] = [{var.name: var for var in (*function.params, *function.returns)}]
        scope = [0]
        loc: Loc | None = None
        used_bytes: int | None = None
        while self.at < last:
            begin = self.at
            word = self.next()
            if word == ";":
                continue
            if word == "{":
                function.scopes.append(scope[-1])
                scope.append(len(function.scopes) - 1)
                names.append({})
            elif word == "}":
                scope.pop()
                names.pop()
            elif word == ".reg":
                self.registers(function, names[-1])
            elif word in _SPACES:
                for var in self.variable(word[1:]):
                    names[-1][var.name] = var
                    function.variables.append(var)
            elif word in _LINKAGE:
                continue
            elif word == ".loc":
                loc = self.loc()
            elif word == ".pragma":
                text = self.next().strip('"')
                self.expect(";")
                if text.startswith("used_bytes_mask"):
                    used_bytes = int(text.split()[1], 0)
            elif self.words[self.at] == ":":
                self.at += 1
                self.label(function, word, scope[-1])
            elif word == "@" or not word.startswith("."):
                self.at = begin
                ins = self.instruction(function, names, loc, scope[-1])
                if ins.op in ("ld", "ldu"):
                    ins.used_bytes, used_bytes = used_bytes, None
                function.instrs.append(ins)
            else:
                raise self.unknown(word, begin)
        self.at = saved

    def label(self, function: Function, name: str, scope: int) -> None:
        if self.words[self.at] in (".branchtargets", ".calltargets"):
            self.at += 1
            found = [self.next()]
            while self.take(","):
                found.append(self.next())
            self.expect(";")
            function.targets[scope, name] = tuple(found)
        elif self.take(".callprototype"):
            returns = self.formals() if self.words[self.at] == "(" else []
            self.next()  # `_`, where a declaration has the function's name
            params = self.formals() if self.words[self.at] == "(" else []
            if not self.take(".noreturn") and self.words[self.at] != ";":
                raise self.unknown(self.words[self.at], self.at)
            self.expect(";")
            sizes = tuple(var.size for var in returns), tuple(var.size for var in params)
            function.prototypes[scope, name] = sizes
        else:
            function.labels[scope, name] = len(function.instrs)

    def registers(self, function: Function, names: dict[str, Reg | Var]) -> None:
        begin, ty = self.at, self.next()[1:]
        if ty not in TYPES:
            raise self.unknown(f".{ty}", begin)
        bits = TYPES[ty][0]
        while True:
            name = self.next()
            spread = [name]
            if self.take("<"):
                spread = [f"{name}{i}" for i in range(self.integer())]
                self.expect(">")
            for each in spread:
                reg = Reg(len(function.regs), each, bits)
                function.regs.append(reg)
                names[each] = reg
            if self.take(";"):
                return
            self.expect(",")

    def instruction(self, function: Function, names: list[dict[str, Reg | Var]], loc: Loc | None, scope: int) -> Instr:
        begin = self.at
        guard, negated = None, False
        if self.take("@"):
            negated = self.take("!")
            found = self.name(self.next(), names)
            if not isinstance(found, Reg):
                raise EmulatorError(f"PTX line {self.line(begin)}: a guard must be a predicate register")
            guard = found
        op, *mods = self.next().split(".")
        args: list[Operand] = []
        returns: tuple[Operand, ...] = ()
        while not self.take(";"):
            if self.words[self.at] == "(":
                listed = self.parenthesised(names)
                if op == "call" and not args:
                    returns = listed
                else:
                    args.extend(listed)
            else:
                args.append(self.operand(names))
            if not self.take(",") and self.words[self.at] != ";":
                raise EmulatorError(f"PTX line {self.line()}: unexpected {self.words[self.at]!r}")
        text = " ".join(self.text[self.starts[begin] : self.starts[self.at - 1] + 1].split())
        return Instr(op, tuple(mods), args, guard, negated, self.line(begin), loc, text, None, returns, scope)

    def parenthesised(self, names: list[dict[str, Reg | Var]]) -> tuple[Operand, ...]:
        self.expect("(")
        found = []
        while not self.take(")"):
            found.append(self.operand(names))
            self.take(",")
        return tuple(found)

    def name(self, word: str, names: list[dict[str, Reg | Var]]) -> Reg | Var | None:
        for level in reversed(names):
            if word in level:
                return level[word]
        return self.module.variables.get(word)

    def operand(self, names: list[dict[str, Reg | Var]]) -> Operand:
        first = self.single(names)
        if self.take("|"):
            return Pair(first, self.single(names))
        return first

    def single(self, names: list[dict[str, Reg | Var]]) -> Operand:
        at = self.at
        word = self.next()
        if word == "{":
            items = []
            while not self.take("}"):
                items.append(self.operand(names))
                self.take(",")
            return Vector(tuple(items))
        if word == "[":
            return self.address(names)
        if word == "!":
            found = self.name(self.next(), names)
            if isinstance(found, Reg):
                return Not(found)
        elif word == "-":
            number = _parse_number(self.next())
            if number.float_bits:
                return Number(number.value ^ 1 << (number.float_bits - 1), number.float_bits)
            return Number(-number.value)
        elif word == "_":
            return Sink()
        elif _NUMBER.fullmatch(word):
            return _parse_number(word)
        elif word == "WARP_SZ":
            return Number(32)
        else:
            found = self.name(word, names)
            if isinstance(found, Reg):
                return found
            if word.startswith("%"):
                if word[1:] in SPECIAL:
                    return Special(word[1:])
                raise UnsupportedInstruction(
                    f"register {word} is not known to the emulator\n"
                    f"  PTX line {self.line(at)}: {self.module.line_text(self.line(at))}"
                )
            offset = 0
            if self.words[self.at] == "+":
                self.at += 1
                offset = self.integer()
            return Sym(word, offset, found)
        raise EmulatorError(f"PTX line {self.line(at)}: cannot read the operand {word!r}")

    def address(self, names: list[dict[str, Reg | Var]]) -> Address:
        base = self.single(names)
        if not isinstance(base, Reg | Sym | Number):
            raise EmulatorError(f"PTX line {self.line()}: cannot read an address")
        offset = 0
        if isinstance(base, Sym):
            base, offset = Sym(base.name, 0, base.var), base.offset
        if self.words[self.at] in ("+", "-"):
            sign = 1 if self.next() == "+" else -1
            offset += sign * self.integer()
        extra = []
        while self.take(","):
            extra.append(self.operand(names))
        self.expect("]")
        return Address(base, offset, tuple(extra))
