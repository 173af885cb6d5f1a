"""Lines of text about a result, from one made by hand."""

from funnel_benchmarks.latency.table import conclusion, introduction, row_line
from latency_results import make_result


def test_lines_of_text_have_the_same_figures():
    result = make_result()
    head = introduction(result)
    assert head[0] == "<tiny & co>: 18 layers of width 512, 69 M parameters (random), bfloat16, bidirectional"
    assert head[1:4] == [
        "2 x 512 tokens",
        "cpu; Imaginary 9000, 2 cores; backend auto, served by xla",
        "medians of 4 runs, funnel and baseline in the order A B B A",
    ]
    line = row_line(result["rows"][0])
    figures = "112.0 106.4 - 123.2 200.0 0.560 0.550 44.0 % 0.982 9,143 333.0"
    assert line.split("  2:1")[0].split() == figures.split()
    assert head[-1].index("funnel; batch") == line.index("2:1 after 2")
    assert conclusion(result)[1:] == [
        "compiling took 7.6 s beforehand; 0 compilations while timing; padding at most "
        "1.3 % of rows; peak memory process 0.78 GB",
        "saved, beside arXiv:2504.02877 (Gemma 2B on a TPU): 44.0 % after layer 2 (paper: 44 %); 2 x 512 tokens",
    ]
    assert conclusion(result | {"rows": []}) == []
