"""Names on the pages, beside those of `vim_ssl.metrics.titles`."""

# Recipe → description; other recipes are shown by their names.
RECIPES = {
    "mim_pretrain": "masked image modelling",
    "clip_pretrain": "contrastive learning of images and captions",
    "supervised_pretrain": "classification",
    "finetune": "fine-tuning",
    "video": "video classification",
}
WIDE_RANGE = ("loss", "pixel_mse", "grad_norm")  # may use a logarithmic axis
# Metrics in zero_shot's metrics.json: section -> title of a row -> (name, key) of its cells.
ZERO_SHOT = {
    "classification": {
        "Classes by name": [("top-1", "top1"), ("top-5", "top5"), ("chance", "chance")]
    },
    "retrieval": {
        title: [*((f"R@{k}", f"{way}_r{k}") for k in (1, 5, 10)), ("chance at R@1", "chance_r1")]
        for title, way in (
            ("Captions of an image", "image_to_text"),
            ("Image of a caption", "text_to_image"),
        )
    },
}
# Columns of classes.csv that are fractions, shown in per cent; the others are shown as written.
FRACTIONS = ("share", "iou", "recall", "precision", "f1", "dice")
