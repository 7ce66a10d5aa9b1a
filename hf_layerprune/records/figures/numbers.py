"""Format measured numbers for display."""

from __future__ import annotations

import math

from .metric_names import BYTES, COUNT, NUMBER, SECONDS, SHARE, get_metric

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def format_number(value: float) -> str:
    """Three significant digits; powers of ten for very large and very small numbers."""
    if value == 0:
        return "0"
    size = abs(float(f"{value:.3g}"))  # as it will be shown: 9.996 is 10.0
    if size >= 1e6 or size < 1e-3:
        mantissa, _, power = f"{value:.1e}".partition("e")
        exponent = int(power)
        return f"{mantissa} {TIMES} 10{str(exponent).translate(_SUPERSCRIPTS)}".replace("-", MINUS)
    if size >= 1000:
        return f"{value:,.0f}".replace("-", MINUS)
    digits = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:.{digits}f}".replace("-", MINUS)


def in_percent(value: float) -> str:
    """A share in percent, without the percent sign."""
    return f"{round(100 * value, 1) + 0:.1f}".replace("-", MINUS)  # no minus sign before a zero


def format_count(value: float) -> str:
    """A number of parameters or tokens, such as `1.24 B`."""
    return _scaled(value, {1e12: " T", 1e9: " B", 1e6: " M", 1e3: " k"}, "")


def format_size(value: float) -> str:
    """A number of bytes in decimal units."""
    return _scaled(value, {1e12: " TB", 1e9: " GB", 1e6: " MB", 1e3: " kB"}, " B")


def _scaled(value: float, units: dict[float, str], otherwise: str) -> str:
    for scale, unit in units.items():
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.{2 if abs(value) < 10 * scale else 1}f}{unit}"
    return f"{value:.0f}{otherwise}"


def with_error(text: str, value: float, stderr: float, *, share: bool) -> str:
    """A value and its standard error, with the same number of decimals."""
    if share:
        return f"{text} ± {in_percent(stderr)}"
    decimals = len(text.partition(".")[2]) if TIMES not in text else -1
    error = f"{stderr:.{decimals}f}" if decimals >= 0 and abs(value) < 1000 else ""
    return f"{text} ± {error if error.strip('0.') else format_number(stderr)}"


def format_duration(value: float) -> str:
    """A duration."""
    if value < 0.9995:
        return f"{1000 * value:.3g} ms"
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def with_sign(text: str, value: float) -> str:
    """A formatted difference with a plus sign if it is not negative."""
    return text if text.startswith(MINUS) or value < 0 else f"+{text}"


def format_ratio(value: float) -> str:
    """A ratio, with a multiplication sign in front."""
    return f"{TIMES} {value:.2f}" if 0.01 <= value < 100 else f"{TIMES} {format_number(value)}"


def format_metric(metric: str, value: float, kind: str | None = None, unit: str | None = None) -> str:
    """Format the value of a metric of `metrics.json`, with the unit unless the metric's label contains it."""
    return format_in_unit(get_metric(metric, kind, unit).unit, value)


def format_in_unit(unit: str, value: float) -> str:
    """Format a number by its unit, one of those in `metric_names`."""
    return _FORMATTERS[unit](value)


_FORMATTERS = {
    SHARE: in_percent,
    BYTES: format_size,
    SECONDS: format_duration,
    COUNT: format_count,
    NUMBER: format_number,
}
