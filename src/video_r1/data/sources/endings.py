"""How the names of manifests, images and videos end."""

IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2",
    ".avif", ".heic", ".heif",
)  # fmt: skip
VIDEO_ENDINGS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".flv",
    ".wmv", ".3gp", ".ogv", ".vob", ".asf", ".mxf",
)  # fmt: skip
MANIFEST_ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet")
