"""The columns of a row. Names alone, so that other tools' configs are read without the libraries that read rows."""

# Refused where they hold something: the models here read text.
MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")

# The columns that a row may use; every other column is ignored.
ROW_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "instruction",
    "question",
    "input",
    "system",
    "history",
    "conversations",
    "messages",
    "rejected_response",
    "rejected_messages",
    "tools",
    "documents",
    "chat_template_kwargs",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    *MEDIA_COLUMNS,
)
