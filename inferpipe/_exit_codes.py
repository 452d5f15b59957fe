"""How the command ends: the exit codes, one meaning each."""

OK = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
REFUSED = 4
INTERRUPTED = 130

MEANINGS = {
    OK: "done",
    FAILED: "the execution failed or was cancelled; `health`: not healthy; `doctor`: a problem; "
    "`validate`: not valid",
    USAGE: "wrong usage: arguments, or an input that is not a JSON object",
    UNREACHABLE: "the server cannot be reached, or did not answer in time",
    REFUSED: "the server refused the call (4xx or 5xx)",
    INTERRUPTED: "interrupted, or the reader of stdout has left",
}
