"""python -m kernels.explain."""

import pytest

from kernels.explain import main


def test_says_which_implementation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forgetting_attention", "--shape=B2,T128,S256,N4,K2,H32", "--pruning=auto"]) == 0
    printed = capsys.readouterr().out
    assert "B2 T128 S256 N4 K2 H32 bfloat16 on cpu, pruning=auto" in printed
    assert any(line.split() == ["xla_chunked", "runs"] for line in printed.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "unknown op nonsense; known ones are"),
        (["--shape=B0"], "'B0' is not a size"),
        (["forgetting_attention", "--shape=Q3"], "has sizes B, T, S, N, K, H; got Q"),
        (["forgetting_attention", "--shape=N3,K2"], "multiple of the number of key/value heads"),
        (["forgetting_attention", "--implementation=magic"], "'magic' does not exist"),
        (["--dtype=float7"], "float7"),
    ],
)
def test_refuses_what_it_does_not_know(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
