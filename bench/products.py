"""Which kernel multiplies faster on this machine, and does fast/linear.py choose it?

    python bench/products.py --threads 1

The products of a model's layers and vocabulary (--shape) at several numbers of rows, by F.linear and by oneDNN, x W^T
and the gradient's g W. The last columns say how many times oneDNN's speed is F.linear's, the larger the better for
oneDNN, and a star marks what `linear` takes. A new kind of CPU earns a line in fast/linear.py where the stars stand
wrong by more than 10%. All is float32 on the CPU: of the flags only --shape, --threads, --repeats (of which the least
counts) and --out are read.
"""

import torch
import torch.nn.functional as F
from common import SHAPES, interleaved, machine, parser, report, settle

import runs
from fast import linear as ours

ROWS = (1, 2, 8, 16, 32, 96, 512)


def main() -> None:
    args = parser(__doc__).parse_args()
    args.device, args.dtype = "cpu", "float32"  # all that is measured here
    settle(args)
    D, V, ffn = (SHAPES[args.shape][name] for name in ("hidden_size", "vocab_size", "intermediate_size"))
    print(f"{machine(args)}\n{'W':>14} {'rows':>5}" + f"{'F.linear':>12}{'oneDNN':>12} times " * 2 + " (then g W)")
    record = {}
    for out, width in ((D, D), (ffn, D), (D, ffn), (V, D)):
        weight = torch.randn(out, width) * 0.05
        for rows in ROWS:
            x, g = torch.randn(rows, width), torch.randn(rows, out)
            calls = max(1, int(4e7 / (rows * weight.numel())))  # some milliseconds

            def onednn(x, w):
                return ours.ONEDNN(x, w, None, "none", [], "")

            def repeated(product, x, w, calls=calls):
                return lambda: [product(x, w) for _ in range(calls)]

            with torch.no_grad():
                seconds = interleaved({
                    "F.linear": repeated(F.linear, x, weight), "oneDNN": repeated(onednn, x, weight),
                    "g W, F.linear": repeated(torch.matmul, g, weight), "g W, oneDNN": repeated(onednn, g, weight.t()),
                }, args.repeats, args.device)
            # The least of several: other jobs on the machine only ever add.
            a, b, c, d = (1e6 * min(s) / calls for s in seconds.values())
            record[f"{out} x {width}, {rows} rows"] = [a, b, c, d]
            star = "*" if ours.onednn_is_faster(rows, weight) else " "
            print(f"{out:>7} x {width:<4} {rows:>5}{a:>9.0f} us{b:>9.0f} us {a / b:>5.2f}{star}"
                  f"{c:>9.0f} us{d:>9.0f} us {c / d:>5.2f}{star if ours.ALWAYS else ' '}", flush=True)
    report(args, {"us": record})


if __name__ == "__main__":
    runs.run_main(main)
