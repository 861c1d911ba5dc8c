"""One call, read from text. `test_parser.py` has more, with everything around it."""

from numballama.server.tools.call import CallReader, Status

NAMES = {"f"}


def test_a_call() -> None:
    call = CallReader(NAMES, "<tool_call>")
    assert call.read('{"name": "f', 0) == 11
    assert (call.status, call.is_call, call.text) == (Status.OPEN, False, '<tool_call>{"name": "f')
    rest = '", "arguments": {"a": 1}, "id": 7} more'
    assert rest[call.read(rest, 0) :] == " more"
    assert (call.status, call.name, "".join(call.arguments)) == (Status.DONE, "f", '{"a": 1}')


def test_a_name_before_the_arguments() -> None:
    call = CallReader(NAMES, "", named=True)
    text = "f[CALL_ID]abc123XYZ[ARGS]{} more"
    assert text[call.read(text, 0) :] == " more"
    assert (call.status, call.name, call.id, call.arguments) == (Status.DONE, "f", "abc123XYZ", ["{}"])
    waiting = CallReader(NAMES, "", named=True)
    assert waiting.read("f[CALL_", 0) == 0 and waiting.wait


def test_no_call() -> None:
    for text in ('{"name": "g", "arguments": {}}', '{"colour": 1}', "[1]", "f", '{"name": 1 2'):
        call = CallReader(NAMES, "", marked=False)
        end = call.read(text, 0)
        assert call.status is Status.BROKEN and not call.is_call and call.text == text[:end]
