"""What waits to be written to the table besides rows."""

from msgspec import Raw

from upkeep import Configs

NAMED = {"switch:0": Raw(b'{"name":"Pump"}'), "wifi": Raw(b'{"ssid":"x"}')}


def test_configurations_that_wait_are_bounded_also_those_that_are_put_back(replace):
    replace(MAX_CONFIGS=10)
    configs = Configs({"switch:0"})
    for round in range(3):
        for n in range(20):
            configs.keep(f"device {round} {n}", NAMED)
        texts, configs.texts = configs.texts, {}
        for n in range(5):
            configs.keep(f"newer {n}", NAMED)
        for src, text in texts.items():
            configs.put_back(src, text)
        assert len(configs.texts) == 10


def test_what_is_put_back_does_not_replace_what_is_newer():
    configs = Configs({"switch:0"})
    configs.keep("device", NAMED)
    configs.put_back("device", "{}")
    assert configs.texts == {"device": '{"switch:0":{"name":"Pump"}}'}
