"""Store URLs as they may be shown: without passwords."""

from urllib.parse import unquote

# In the name of an option: its value is shown nowhere.
_SECRETS = ("password", "secret", "scram_")


def is_secret(option: str) -> bool:
    """Tell whether the value of `option`, written name=value, is shown nowhere."""
    name = unquote(option.partition("=")[0])
    return any(each in name for each in _SECRETS)


def without_secrets(url: str) -> str:
    """Whatever was given as a URL, for a message: rather too little than a password."""
    before, separator, rest = url.partition("://")
    if not separator:
        before, rest = "", url
    place, mark, query = rest.partition("?")
    if "@" in rest:
        # Unescaped, a password may hold what else would end it.
        user, _, place = rest.rpartition("@")
        place, mark, query = place.partition("?")
        colon = "***" if ":" in user else ""
        place = f"{user.partition(':')[0]}{':' if colon else ''}{colon}@{place}"
    parts = [
        f"{part.partition('=')[0]}=***" if is_secret(part) else part
        for part in query.split("&")
    ]
    return f"{before}{separator}{place}{mark}{'&'.join(parts)}"
