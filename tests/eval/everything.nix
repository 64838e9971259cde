# A gateway for which every option is set to what is not its default.
{
  config,
  pkgs,
  ...
}:

{
  services.headgate = {
    enable = true;
    package = pkgs.headgate;
    cpu = "cortex-a53";

    links = [
      {
        name = "hosted";
        kind = "mqtt";
        servers = [ "mqtts://broker.example:8883" ];
        ship = [
          {
            topics = [ "plant/#" ];
            add_prefix = "sites/{site}/";
          }
        ];
      }
    ];

    rules = [
      {
        topics = [ "alarms/#" ];
        lane = "realtime";
        retries = 1;
      }
      {
        topics = [ "orders/#" ];
        durable = true;
        dedup = "id";
        dedup_property = "order";
      }
      {
        topics = [ "plant/#" ];
        lane = "batch";
        window_events = 10;
        window_bytes = 1000;
        window_age_ms = 100;
      }
    ];

    mappings = {
      pump = {
        stream_processor = {
          mode = "timeseries";
          model = {
            name = "pump";
            version = "v1";
          };
          output_topic = "umh.v1.corpA.plant-A.aawd";
          sources.press = "umh.v1.corpA.plant-A.aawd._raw.press";
          mapping.pressure = "press * 100";
        };
      };
    };

    settings = {
      mappings = {
        queue_events = 1000;
        singleton = "pump, line-1";
      };
      store = {
        path = "/var/lib/headgate/store";
        max_bytes = 2147483648;
      };
      mqtt = {
        listen = "192.0.2.1:883";
        max_connections = 90000;
        max_packet_bytes = "256KiB";
        connect_timeout_ms = 1000;
        write_timeout_ms = 2000;
        max_keep_alive_s = 600;
        max_inflight = 16;
        receive_maximum = 512;
        max_queued_messages = 5000;
        max_queued_bytes = "4 MiB";
        max_total_queued_bytes = "64 MiB";
        max_subscriptions = 50;
        max_total_subscriptions = 5000;
        session_expiry_max_s = 3600;
        response_information = "response/%c";
        max_retained_messages = 2000;
        max_retained_bytes = "8 MiB";
        max_messages_per_s = 100;
        max_bytes_per_s = "1 MiB";
        max_total_bytes_per_s = "16 MiB";
        max_incoming_bytes = "32 MiB";
        system_topics_every_s = 60;
        auth = {
          anonymous = "never";
          password_file = "/var/lib/headgate/passwords";
          jwt_key = "/etc/headgate/jwt.pem";
          acl_file = "/etc/headgate/acl.toml";
          max_failures_per_minute = 20;
        };
        persistence = {
          max_bytes_per_client = "16 MiB";
          max_bytes = "128 MiB";
          durable_acks = false;
        };
        tls = {
          listen = "[::]:8883";
          certificate = "/etc/headgate/mqtt.crt";
          key = "${config.services.headgate.credentialsDirectory}/mqtt.key";
          client_certificates = "required";
          client_ca = "/etc/headgate/clients.crt";
          client_crl = "/var/lib/headgate-crl/revoked.pem";
        };
        websocket = {
          listen = "[::]:8083";
          tls_listen = "[::]:8084";
          path = "/plant";
        };
      };
      uplink = {
        links_file = "/etc/headgate/links.toml";
        gateway = "press-7";
        site = "north";
      };
      pipeline = {
        queue_events = 1024;
        rules_file = "/etc/headgate/rules.toml";
        batch = {
          max_events = 32;
          max_delay_us = 500;
        };
        realtime = {
          queue_events = 2048;
          max_waiting_events = 1000;
          max_latency_ms = 50;
          max_dropped_percent = 1;
        };
        windows = {
          queue_events = 4096;
          max_events = 100;
          max_bytes = "64KiB";
          max_age_ms = 1000;
        };
        dedup = {
          window_s = 600;
          max_keys = 100000;
        };
      };
      journal = {
        topics = "plant/#, alarms/#";
        max_bytes = "2GiB";
        max_age_s = 604800;
        segment_bytes = "16MiB";
        io_uring = false;
      };
      apps = {
        workers = 2;
        queue_events = 4096;
        epoch_ms = 10;
        memory_pages = 128;
        max_memory_pages = 512;
        batch_deadline_ms = 50;
        max_batch_deadline_ms = 1000;
        max_kv_bytes = "16MiB";
        max_uses = 1000000;
        simd = false;
        aot_cache = false;
        pool_instances = 64;
        cold_start_target_ms = 50;
        gpio = "overheat-alarm-2";
        sensors = "*";
      };
      ingest = {
        listen = "192.0.2.1:7411";
        tls_listen = "[::]:7412";
        max_connections = 64;
        max_frame_bytes = "64KiB";
        handshake_timeout_ms = 1000;
        idle_timeout_s = 600;
        io_uring = false;
      };
      ota = {
        ca_file = "/etc/headgate/ca.pem";
        caches = "https://cache.example.org, file:///srv/cache";
        channel = "https://updates.example.org/stable";
        esp = "/efi";
        health = {
          deadline_s = 600;
          min_flow_percent = 50;
          settle_s = 30;
        };
        keep_generations = 4;
        max_bytes_per_second = "1MiB";
        min_free_bytes = "512MiB";
        nix_store = "/run/current-system/sw/bin/nix-store";
        pin = "1.2.0";
        product = "headgate-line-2";
        proxy = "http://proxy.example.org:3128";
        reboot = "never";
        root = "/sysroot";
        state = "/var/lib/headgate-updates";
        tries = 2;
        trusted_keys = "plant-1:Ek6nP3k4WlX1CqVYqPTnOqVNV5r3mY4pZ5zl4rQYc3I=";
        window = "Sat,Sun 22:00-04:00";
      };
      metrics.listen = "192.0.2.1:9464";
      admin.socket = "/run/headgate/other.sock";
      log = {
        format = "json";
        level = "info,headgate::broker=debug";
      };
      shutdown.timeout_ms = 20000;
    };

    credentials."mqtt.key" = "/var/lib/secrets/mqtt.key";
    openFirewall = {
      mqtt = true;
      mqttTls = true;
      mqttWebSocket = true;
      mqttWebSocketTls = true;
      ingest = true;
      ingestTls = true;
      metrics = true;
    };

    apps = {
      overheat-alarm.package = "${pkgs.headgate-apps}/overheat-alarm";
      line-2 = {
        name = "overheat-alarm-2";
        component = "${pkgs.headgate-apps}/overheat-alarm/overheat-alarm.wasm";
        version = "1.2.3-rc.1";
        description = ''Watches "line 2", C:\temp and ünïcode'';
        subscribe = [
          "plant/line2/+"
          "#"
        ];
        publish = [ "alarms/#" ];
        config = {
          threshold = 90.5;
          hysteresis = 5;
          verbose = true;
          "a key.with dots" = "text\nof two lines";
        };
        capabilities = [
          "gpio"
          "sensors"
        ];
        gpio = [
          {
            name = "door";
            chip = "gpiochip0";
            line = 17;
            direction = "input";
            active_low = true;
          }
          {
            name = "lamp";
            chip = "gpiochip0";
            line = "LAMP";
            direction = "output";
          }
        ];
        sensor = [
          {
            name = "cpu";
            device = "cpu_thermal";
            channel = "temp1_input";
          }
        ];
        limits = {
          memory_pages = 64;
          batch_deadline_ms = 20;
          queue_events = 10;
          publish_per_batch = 0;
          log_per_batch = 1;
          kv_bytes = 65536;
          kv_per_batch = 2;
          timers = 3;
          table_elements = 1000;
          instances = 4;
          weight = 50;
          queue_full = "drop-oldest";
        };
        restart = {
          retries = 2;
          first_pause_ms = 50;
          longest_pause_ms = 1000;
          most_failures = 5;
          window_s = 30;
        };
        recycle = {
          max_uses = 1000;
          max_failures = 10;
        };
        upgrade.trial_batches = 5;
        state_version = 2;
        placement = "singleton";
      };
      off = {
        enable = false;
        component = null;
      };
    };
  };
}
