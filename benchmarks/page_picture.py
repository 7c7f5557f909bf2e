"""The picture of a page: a latent's family in the forest, and the evidence for one of its children.

    sae-matryoshka tree sae_lens_matryoshka/demo/smollm2_sae --dataset smollm2/texts/held_out \\
        --tokens 200000 --out page
    python benchmarks/page_picture.py page/index.html --latent 105 --out docs/images/tree.png

The first command needs the model where its name finds it: `make smollm2`, then from that folder.
"""

import shutil
from argparse import ArgumentParser
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--latent", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of a Chromium")
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser)
        page = browser.new_page(
            viewport={"width": 1280, "height": 800}, device_scale_factor=2, color_scheme="light"
        )
        page.goto(f"{args.page.resolve().as_uri()}#latent={args.latent}")
        page.locator(f"#row-{args.latent} .caret").click()
        page.locator("#family details.edge summary .cell").first.click()
        page.locator("#family .firing .example").first.wait_for()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=args.out)
        browser.close()
    # A third of the bytes; the octree keeps rare colours, which the median cut merges
    picture = Image.open(args.out).convert("RGB").quantize(method=Image.Quantize.FASTOCTREE)
    picture.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
