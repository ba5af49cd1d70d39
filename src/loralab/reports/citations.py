"""BibTeX of what a run may have used.

Owns the entries; which of them a run used is `methods.py`'s.
"""


def _entry(kind: str, key: str, **fields: str) -> str:
    lines = [f"  {name:<13} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


def _arxiv(number: str) -> dict[str, str]:
    return {"eprint": number, "archivePrefix": "arXiv"}


def _neurips(year: int) -> str:
    return f"Advances in Neural Information Processing Systems {year - 1987}"


_ICLR = "International Conference on Learning Representations"
_ICML = "Proceedings of the {} International Conference on Machine Learning"

ENTRIES: dict[str, str] = {
    "lora": _entry(
        "inproceedings",
        "hu2022lora",
        title="{LoRA}: Low-Rank Adaptation of Large Language Models",
        author="Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and "
        "Wang, Shean and Wang, Lu and Chen, Weizhu",
        booktitle=_ICLR,
        year="2022",
        **_arxiv("2106.09685"),
    ),
    "rslora": _entry(
        "misc",
        "kalajdzievski2023rslora",
        title="A Rank Stabilization Scaling Factor for Fine-Tuning with {LoRA}",
        author="Kalajdzievski, Damjan",
        year="2023",
        **_arxiv("2312.03732"),
    ),
    "dora": _entry(
        "inproceedings",
        "liu2024dora",
        title="{DoRA}: Weight-Decomposed Low-Rank Adaptation",
        author="Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and "
        "Wang, Yu-Chiang Frank and Cheng, Kwang-Ting and Chen, Min-Hung",
        booktitle=_ICML.format("41st"),
        year="2024",
        **_arxiv("2402.09353"),
    ),
    "lora_plus": _entry(
        "inproceedings",
        "hayou2024loraplus",
        title="{LoRA+}: Efficient Low Rank Adaptation of Large Models",
        author="Hayou, Soufiane and Ghosh, Nikhil and Yu, Bin",
        booktitle=_ICML.format("41st"),
        year="2024",
        **_arxiv("2402.12354"),
    ),
    "pissa": _entry(
        "inproceedings",
        "meng2024pissa",
        title="{PiSSA}: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        author="Meng, Fanxu and Wang, Zhaohui and Zhang, Muhan",
        booktitle=_neurips(2024),
        year="2024",
        **_arxiv("2404.02948"),
    ),
    "olora": _entry(
        "misc",
        "buyukakyuz2024olora",
        title="{OLoRA}: Orthonormal Low-Rank Adaptation of Large Language Models",
        author='B{\\"u}y{\\"u}kaky{\\"u}z, Kerim',
        year="2024",
        **_arxiv("2406.01775"),
    ),
    "eva": _entry(
        "misc",
        "paischer2024eva",
        title="One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
        author="Paischer, Fabian and Hauzenberger, Lukas and Schmied, Thomas and Alkin, Benedikt and "
        "Deisenroth, Marc Peter and Hochreiter, Sepp",
        year="2024",
        **_arxiv("2410.07170"),
    ),
    "loftq": _entry(
        "inproceedings",
        "li2024loftq",
        title="{LoftQ}: {LoRA}-Fine-Tuning-Aware Quantization for Large Language Models",
        author="Li, Yixiao and Yu, Yifan and Liang, Chen and He, Pengcheng and Karampatziakis, Nikos and "
        "Chen, Weizhu and Zhao, Tuo",
        booktitle=_ICLR,
        year="2024",
        **_arxiv("2310.08659"),
    ),
    "vera": _entry(
        "inproceedings",
        "kopiczko2024vera",
        title="{VeRA}: Vector-based Random Matrix Adaptation",
        author="Kopiczko, Dawid J. and Blankevoort, Tijmen and Asano, Yuki M.",
        booktitle=_ICLR,
        year="2024",
        **_arxiv("2310.11454"),
    ),
    "loha": _entry(
        "inproceedings",
        "hyeonwoo2022fedpara",
        title="{FedPara}: Low-Rank {Hadamard} Product for Communication-Efficient Federated Learning",
        author="Hyeon-Woo, Nam and Ye-Bin, Moon and Oh, Tae-Hyun",
        booktitle=_ICLR,
        year="2022",
        **_arxiv("2108.06098"),
    ),
    "lycoris": _entry(
        "inproceedings",
        "yeh2024lycoris",
        title="Navigating Text-To-Image Customization: From {LyCORIS} Fine-Tuning to Model Evaluation",
        author="Yeh, Shih-Ying and Hsieh, Yu-Guan and Gao, Zhidong and Yang, Bernard B. W. and Oh, Giyeong and "
        "Gong, Yanmin",
        booktitle=_ICLR,
        year="2024",
        **_arxiv("2309.14859"),
    ),
    "ia3": _entry(
        "inproceedings",
        "liu2022ia3",
        title="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        author="Liu, Haokun and Tam, Derek and Muqeeth, Mohammed and Mohta, Jay and Huang, Tenghao and "
        "Bansal, Mohit and Raffel, Colin",
        booktitle=_neurips(2022),
        year="2022",
        **_arxiv("2205.05638"),
    ),
    "qlora": _entry(
        "inproceedings",
        "dettmers2023qlora",
        title="{QLoRA}: Efficient Finetuning of Quantized {LLMs}",
        author="Dettmers, Tim and Pagnoni, Artidoro and Holtzman, Ari and Zettlemoyer, Luke",
        booktitle=_neurips(2023),
        year="2023",
        **_arxiv("2305.14314"),
    ),
    "int8": _entry(
        "misc",
        "dettmers2022llmint8",
        title="{LLM.int8()}: 8-bit Matrix Multiplication for Transformers at Scale",
        author="Dettmers, Tim and Lewis, Mike and Belkada, Younes and Zettlemoyer, Luke",
        year="2022",
        **_arxiv("2208.07339"),
    ),
    "peft": _entry(
        "misc",
        "mangrulkar2022peft",
        title="{PEFT}: State-of-the-art Parameter-Efficient Fine-Tuning methods",
        author="Mangrulkar, Sourab and Gugger, Sylvain and Debut, Lysandre and Belkada, Younes and Paul, Sayak and "
        "Bossan, Benjamin",
        year="2022",
        howpublished="\\url{https://github.com/huggingface/peft}",
    ),
    "transformers": _entry(
        "inproceedings",
        "wolf2020transformers",
        title="Transformers: State-of-the-Art Natural Language Processing",
        author="Wolf, Thomas and Debut, Lysandre and Sanh, Victor and Chaumond, Julien and Delangue, Clement and "
        "others",
        booktitle="Proceedings of the 2020 Conference on Empirical Methods in Natural Language Processing: System "
        "Demonstrations",
        pages="38--45",
        year="2020",
    ),
    "torch": _entry(
        "inproceedings",
        "paszke2019pytorch",
        title="{PyTorch}: An Imperative Style, High-Performance Deep Learning Library",
        author="Paszke, Adam and Gross, Sam and Massa, Francisco and Lerer, Adam and others",
        booktitle=_neurips(2019),
        year="2019",
        **_arxiv("1912.01703"),
    ),
    "adamw": _entry(
        "inproceedings",
        "loshchilov2019adamw",
        title="Decoupled Weight Decay Regularization",
        author="Loshchilov, Ilya and Hutter, Frank",
        booktitle=_ICLR,
        year="2019",
        **_arxiv("1711.05101"),
    ),
    "adamw_8bit": _entry(
        "inproceedings",
        "dettmers2022optimizers",
        title="8-bit Optimizers via Block-wise Quantization",
        author="Dettmers, Tim and Lewis, Mike and Shleifer, Sam and Zettlemoyer, Luke",
        booktitle=_ICLR,
        year="2022",
        **_arxiv("2110.02861"),
    ),
    "adafactor": _entry(
        "inproceedings",
        "shazeer2018adafactor",
        title="{Adafactor}: Adaptive Learning Rates with Sublinear Memory Cost",
        author="Shazeer, Noam and Stern, Mitchell",
        booktitle=_ICML.format("35th"),
        year="2018",
        **_arxiv("1804.04235"),
    ),
    "calibration": _entry(
        "inproceedings",
        "guo2017calibration",
        title="On Calibration of Modern Neural Networks",
        author="Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.",
        booktitle=_ICML.format("34th"),
        year="2017",
        **_arxiv("1706.04599"),
    ),
    "brier": _entry(
        "article",
        "brier1950verification",
        title="Verification of Forecasts Expressed in Terms of Probability",
        author="Brier, Glenn W.",
        journal="Monthly Weather Review",
        volume="78",
        number="1",
        pages="1--3",
        year="1950",
    ),
    "rouge": _entry(
        "inproceedings",
        "lin2004rouge",
        title="{ROUGE}: A Package for Automatic Evaluation of Summaries",
        author="Lin, Chin-Yew",
        booktitle="Text Summarization Branches Out",
        pages="74--81",
        year="2004",
    ),
    "bleu": _entry(
        "inproceedings",
        "papineni2002bleu",
        title="{Bleu}: a Method for Automatic Evaluation of Machine Translation",
        author="Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing",
        booktitle="Proceedings of the 40th Annual Meeting of the Association for Computational Linguistics",
        pages="311--318",
        year="2002",
    ),
    "sacrebleu": _entry(
        "inproceedings",
        "post2018sacrebleu",
        title="A Call for Clarity in Reporting {BLEU} Scores",
        author="Post, Matt",
        booktitle="Proceedings of the Third Conference on Machine Translation: Research Papers",
        pages="186--191",
        year="2018",
    ),
    "chrf": _entry(
        "inproceedings",
        "popovic2015chrf",
        title="{chrF}: character n-gram {F}-score for automatic {MT} evaluation",
        author="Popovi{\\'c}, Maja",
        booktitle="Proceedings of the Tenth Workshop on Statistical Machine Translation",
        pages="392--395",
        year="2015",
    ),
    "bootstrap": _entry(
        "book",
        "efron1993bootstrap",
        title="An Introduction to the Bootstrap",
        author="Efron, Bradley and Tibshirani, Robert J.",
        publisher="Chapman and Hall",
        year="1993",
    ),
    "wilson": _entry(
        "article",
        "wilson1927inference",
        title="Probable Inference, the Law of Succession, and Statistical Inference",
        author="Wilson, Edwin B.",
        journal="Journal of the American Statistical Association",
        volume="22",
        number="158",
        pages="209--212",
        year="1927",
    ),
    "mcnemar": _entry(
        "article",
        "mcnemar1947note",
        title="Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages",
        author="McNemar, Quinn",
        journal="Psychometrika",
        volume="12",
        number="2",
        pages="153--157",
        year="1947",
    ),
}


def cite_loralab(version: str) -> str:
    """Return the entry of this program.

    Args:
        version: the version that ran, or an empty text where it is not recorded.
    """
    return _entry("misc", "loralab", title="loralab", **({"note": f"Version {version}"} if version else {}))
