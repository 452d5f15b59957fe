#!lua name=inferpipe_webhooks_v1
-- Webhooks and their deliveries. The keys stand at the top of redis_functions.lua. All of one
-- endpoint (its queue, its health, its deliveries) is in the partition that its id names, so that
-- each function below is one atomic step there. Times are the server's own.

local BACKLOG_DEFAULT = 200000       -- until a dispatcher has said what the settings say
local RETENTION_DEFAULT_MS = 259200000
local ENDPOINTS_MAX = 64             -- endpoints looked at in one claim; the rest by the next
local DISPATCHERS_MAX = 8            -- dead ones reaped in one claim
local ATTEMPTS_KEPT = 50             -- of one delivery's log, over all replays
local WINDOW_FIRST = 2               -- deliveries at once to an endpoint that nobody knows yet
local WINDOW_FALL = 2                -- for a failure; a success adds 1: it grows while one in three fails
local SPAN_MS = 259200000            -- a delivery's tries and pauses are over within three days
local NUMBER = '#'                   -- field of p:do: the dispatcher's last claim; no delivery's id
local SCAN_MAX = 2000                -- entries looked at for one page of a filtered list

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function text(n)
  return string.format('%.0f', n)
end

-- Set when an endpoint is to be looked at next, or never while it has nothing; -> that time.
-- Among endpoints that are due, the one served longest ago comes first: with a full dispatcher a
-- long queue waits its turn behind short ones.
local function plan(p, wh)
  local h = redis.call('HMGET', p .. ':dh:' .. wh, 'win', 'flying', 'until', 'served')
  local flying = tonumber(h[2] or '0')
  local due = redis.call('ZRANGE', p .. ':dq:' .. wh, 0, 0, 'WITHSCORES')
  if not due[2] or flying >= tonumber(h[1] or WINDOW_FIRST) then
    redis.call('ZREM', p .. ':de', wh)
    return nil
  end
  local at = math.max(tonumber(due[2]), tonumber(h[3] or '0'), tonumber(h[4] or '0'))
  redis.call('ZADD', p .. ':de', text(at), wh)
  return at
end

local function land(p, wh)
  -- An endpoint that was forgotten meanwhile has no count any more.
  local flying = tonumber(redis.call('HGET', p .. ':dh:' .. wh, 'flying') or '0')
  if flying > 0 then redis.call('HINCRBY', p .. ':dh:' .. wh, 'flying', -1) end
end

local function finish(p, d, status, retention)
  local key = p .. ':dl:' .. d
  redis.call('HSET', key, 'st', status, 'next', '')
  redis.call('PEXPIRE', key, retention)
end

-- accept: delivery "webhook:<webhook>:<ws>:<event>:<type>" body -> 1 when it is new here
local function accept(keys, args)
  local p, d, now = keys[1], args[1], now_ms()
  local wh, ws, ev, ty = string.match(args[2], '^webhook:([^:]*):([^:]*):([^:]*):([^:]*)$')
  local key = p .. ':dl:' .. d
  if redis.call('EXISTS', key) == 1 then return 0 end
  local limits = redis.call('HMGET', p .. ':dc', 'backlog', 'retention')
  redis.call('HSET', key, 'wh', wh, 'ws', ws, 'ev', ev, 'ty', ty, 'body', args[3], 'st', 'pending',
    'n', 0, 't', 0, 'at', text(now), 'next', text(now), 'log', '')
  redis.call('ZADD', p .. ':dx:' .. wh, text(now), d)
  if redis.call('ZCARD', p .. ':dq:' .. wh) >= tonumber(limits[1] or BACKLOG_DEFAULT) then
    -- Not lost: it is seen as dead, and a replay sends it.
    redis.call('HSET', key, 'log', cjson.encode({at_ms = now, latency_ms = 0, error = 'the queue of this endpoint is full'}) .. '\n')
    finish(p, d, 'dead', limits[2] or RETENTION_DEFAULT_MS)
    return 1
  end
  redis.call('ZADD', p .. ':dq:' .. wh, text(now), d)
  local at = plan(p, wh)
  if at and at <= now then redis.call('SPUBLISH', p .. ':due', cmsgpack.pack({'due'})) end
  return 1
end

-- Give back what a dispatcher holds: it is dead, or it stops.
local function release(p, dispatcher)
  redis.call('ZREM', p .. ':dw', dispatcher)
  local held = redis.call('HGETALL', p .. ':do:' .. dispatcher)
  redis.call('DEL', p .. ':do:' .. dispatcher)
  local now = now_ms()
  local count = 0
  for i = 1, #held, 2 do
    local d, wh = held[i], held[i + 1]
    if d ~= NUMBER then
      if redis.call('EXISTS', p .. ':dl:' .. d) == 1 then
        redis.call('HDEL', p .. ':dl:' .. d, 'lease')
        redis.call('ZADD', p .. ':dq:' .. wh, text(now), d)
      end
      land(p, wh)
      plan(p, wh)
      count = count + 1
    end
  end
  if count > 0 then redis.call('SPUBLISH', p .. ':due', cmsgpack.pack({'due'})) end
  return count
end

local function leased(p, d, lease, wh)
  local f = redis.call('HMGET', p .. ':dl:' .. d, 'ws', 'ev', 'ty', 'n', 'body')
  return {d, lease, wh, f[1], f[2], f[3], f[4], f[5]}
end

-- What a claim whose answer was lost has leased: the same claim, sent again, must get it.
local function leased_by(p, me, number)
  local got, held = {}, redis.call('HGETALL', p .. ':do:' .. me)
  for i = 1, #held, 2 do
    local lease = held[i] ~= NUMBER and redis.call('HGET', p .. ':dl:' .. held[i], 'lease')
    if lease and string.sub(lease, 1, #me + #number + 2) == me .. '/' .. number .. '/' then
      got[#got + 1] = leased(p, held[i], lease, held[i + 1])
    end
  end
  return got
end

-- claim: dispatcher ttl_ms limit window_max backlog_max retention_ms number
-- -> {now, when to look again or -1, {{delivery, lease, wh, ws, ev, ty, n, body}...}}
-- `number` counts the dispatcher's claims here: one that comes twice is answered twice alike.
-- It renews the dispatcher's own lease too, and takes back what dead ones hold.
local function claim(keys, args)
  local p, me, now = keys[1], args[1], now_ms()
  local lease, ttl = redis.call('ZSCORE', p .. ':dw', me), tonumber(args[2])
  -- Written only when it must be: an idle claim then costs the server no fsync.
  if not lease or tonumber(lease) < now + ttl * 3 / 4 then
    redis.call('ZADD', p .. ':dw', text(now + ttl), me)
  end
  local limits = redis.call('HMGET', p .. ':dc', 'backlog', 'retention', 'window')
  if limits[1] ~= args[5] or limits[2] ~= args[6] or limits[3] ~= args[4] then
    redis.call('HSET', p .. ':dc', 'backlog', args[5], 'retention', args[6], 'window', args[4])
  end
  if lease and tonumber(lease) > now then
    -- As in `heartbeat`: only who is in good standing takes from others.
    for _, other in ipairs(redis.call('ZRANGEBYSCORE', p .. ':dw', '-inf', text(now), 'LIMIT', 0, DISPATCHERS_MAX)) do
      release(p, other)
    end
  end
  local got, limit, number = {}, tonumber(args[3]), args[7]
  local endpoints = {}
  if redis.call('HGET', p .. ':do:' .. me, NUMBER) == number then
    got = leased_by(p, me, number)
  elseif limit > 0 then
    endpoints = redis.call('ZRANGEBYSCORE', p .. ':de', '-inf', text(now), 'LIMIT', 0, ENDPOINTS_MAX)
  end
  -- A share for each endpoint that is due, so that the first cannot take all there is room for.
  local share = #endpoints > 0 and math.max(1, math.floor(limit / #endpoints)) or 0
  for _, wh in ipairs(endpoints) do
    local h = redis.call('HMGET', p .. ':dh:' .. wh, 'win', 'flying')
    local free = tonumber(h[1] or WINDOW_FIRST) - tonumber(h[2] or '0')
    local room = math.min(free, share, limit - #got)
    if room > 0 then
      for _, d in ipairs(redis.call('ZRANGEBYSCORE', p .. ':dq:' .. wh, '-inf', text(now), 'LIMIT', 0, room)) do
        redis.call('ZREM', p .. ':dq:' .. wh, d)
        if redis.call('EXISTS', p .. ':dl:' .. d) == 1 then
          local lease = me .. '/' .. number .. '/' .. redis.call('INCR', p .. ':dn')
          redis.call('HSET', p .. ':dl:' .. d, 'lease', lease)
          redis.call('HSET', p .. ':do:' .. me, d, wh)
          redis.call('HINCRBY', p .. ':dh:' .. wh, 'flying', 1)
          got[#got + 1] = leased(p, d, lease, wh)
        end
      end
      redis.call('HSET', p .. ':dh:' .. wh, 'served', text(now))
    end
    plan(p, wh)
  end
  if #got > 0 then redis.call('HSET', p .. ':do:' .. me, NUMBER, number) end
  local next_one = redis.call('ZRANGE', p .. ':de', 0, 0, 'WITHSCORES')
  return {text(now), next_one[2] or '-1', got}
end

-- record: dispatcher wh delivery lease status next_in_ms attempt(JSON or '') health(ok|bad|'')
-- -> {'stale'} | {'new', failures, failing since or '', now, when to look again or -1}
local function record(keys, args)
  local p, me, wh, d, status = keys[1], args[1], args[2], args[3], args[5]
  local key, health, now = p .. ':dl:' .. d, p .. ':dh:' .. args[2], now_ms()
  local h = redis.call('HMGET', key, 'lease', 'log', 't', 'n')
  if h[1] ~= args[4] then
    if not h[1] then redis.call('HDEL', p .. ':do:' .. me, d) end  -- forgotten while it was sent
    return {'stale'}
  end
  redis.call('HDEL', key, 'lease')
  redis.call('HDEL', p .. ':do:' .. me, d)
  land(p, wh)
  local limits = redis.call('HMGET', p .. ':dc', 'retention', 'window')
  local retention = tonumber(limits[1] or RETENTION_DEFAULT_MS)
  if args[7] ~= '' then
    local log, count = h[2] .. args[7] .. '\n', tonumber(h[3]) + 1
    if count > ATTEMPTS_KEPT then log = string.sub(log, string.find(log, '\n', 1, true) + 1) end
    redis.call('HSET', key, 'log', log, 't', count, 'n', tonumber(h[4]) + 1)
  end
  if status == 'failed' then
    local at = text(now + tonumber(args[6]))
    redis.call('HSET', key, 'st', status, 'next', at)
    redis.call('ZADD', p .. ':dq:' .. wh, at, d)
  else
    finish(p, d, status, retention)
    redis.call('ZREMRANGEBYSCORE', p .. ':dx:' .. wh, '-inf', text(now - retention - SPAN_MS))
  end
  local window = tonumber(redis.call('HGET', health, 'win') or WINDOW_FIRST)
  if args[8] == 'ok' then
    redis.call('HDEL', health, 'fails', 'since', 'until')
    redis.call('HSET', health, 'win', math.min(window + 1, tonumber(limits[2] or WINDOW_FIRST)))
  elseif args[8] == 'bad' then
    redis.call('HINCRBY', health, 'fails', 1)
    redis.call('HSETNX', health, 'since', text(now))
    redis.call('HSET', health, 'win', math.max(1, window - WINDOW_FALL))
  end
  local at = plan(p, wh)
  local seen = redis.call('HMGET', health, 'fails', 'since')
  return {'new', tonumber(seen[1] or '0'), seen[2] or '', text(now), at and text(at) or '-1'}
end

-- pause: wh for_ms: leave an endpoint alone for so long
local function pause(keys, args)
  redis.call('HSET', keys[1] .. ':dh:' .. args[1], 'until', text(now_ms() + tonumber(args[2])), 'win', 1)
  plan(keys[1], args[1])
  return 1
end

-- replay: delivery ws -> 1 sent again soon, 0 under way already, -1 not there
local function replay(keys, args)
  local p, d, now = keys[1], args[1], now_ms()
  local key = p .. ':dl:' .. d
  local h = redis.call('HMGET', key, 'ws', 'wh', 'lease')
  if h[1] ~= args[2] then return -1 end
  if h[3] then return 0 end
  redis.call('PERSIST', key)
  redis.call('HSET', key, 'st', 'pending', 'n', 0, 'next', text(now))
  redis.call('ZADD', p .. ':dq:' .. h[2], text(now), d)
  redis.call('ZADD', p .. ':dx:' .. h[2], 'NX', text(now), d)
  local at = plan(p, h[2])
  if at and at <= now then redis.call('SPUBLISH', p .. ':due', cmsgpack.pack({'due'})) end
  return 1
end

local function row(p, d)
  local h = redis.call('HMGET', p .. ':dl:' .. d, 'ws', 'wh', 'ev', 'ty', 'st', 'at', 'next', 'log')
  if not h[1] then return nil end
  return {d, h[1], h[2], h[3], h[4], h[5], h[6], h[7], h[8]}
end

-- deliveries: wh before_ms before_id limit status from_ms -> {rows, last looked at {ms, id} or {}}
-- Newest first, those of one millisecond by id downwards.
local function deliveries(keys, args)
  local p, wh, before, before_id, limit, status = keys[1], args[1], args[2], args[3], tonumber(args[4]), args[5]
  local rows, last, looked = {}, {}, 0
  local offset = 0
  while #rows < limit and looked < SCAN_MAX do
    local page = redis.call('ZREVRANGEBYSCORE', p .. ':dx:' .. wh, before, args[6], 'WITHSCORES', 'LIMIT', offset, 200)
    if #page == 0 then return {rows, {}} end
    for i = 1, #page, 2 do
      local d, at = page[i], page[i + 1]
      local is_seen = before_id ~= '' and at == before and d >= before_id
      if not is_seen then
        looked = looked + 1
        last = {at, d}
        local found = row(p, d)
        if found and (status == '' or found[6] == status) then rows[#rows + 1] = found end
        if #rows >= limit or looked >= SCAN_MAX then return {rows, last} end
      end
    end
    offset = offset + 200
  end
  return {rows, last}
end

-- delivery: d -> its row, or nothing
local function delivery(keys, args)
  return row(keys[1], args[1]) or {}
end

-- forget: wh limit -> deliveries still there; an endpoint that was deleted leaves nothing behind
local function forget(keys, args)
  local p, wh = keys[1], args[1]
  redis.call('DEL', p .. ':dq:' .. wh, p .. ':dh:' .. wh)
  redis.call('ZREM', p .. ':de', wh)
  for _, d in ipairs(redis.call('ZRANGE', p .. ':dx:' .. wh, 0, tonumber(args[2]) - 1)) do
    redis.call('DEL', p .. ':dl:' .. d)
    redis.call('ZREM', p .. ':dx:' .. wh, d)
  end
  return redis.call('ZCARD', p .. ':dx:' .. wh)
end

-- put: ws id expected_revision record max -> 1 | 0 changed meanwhile, or gone | -1 too many
-- A record is kept as "<revision> <JSON>"; expected 0: it must not be there yet.
local function put(keys, args)
  local key, expected = keys[1] .. ':hooks:' .. args[1], tonumber(args[3])
  local present = redis.call('HGET', key, args[2])
  local revision = present and tonumber(string.match(present, '^(%d+) ')) or 0
  if revision ~= expected then
    return present == text(expected + 1) .. ' ' .. args[4] and 1 or 0  -- 1: this very call came twice
  end
  if expected == 0 and redis.call('HLEN', key) >= tonumber(args[5]) then return -1 end
  redis.call('HSET', key, args[2], text(expected + 1) .. ' ' .. args[4])
  return 1
end

redis.register_function('ip1_webhook_accept', accept)
redis.register_function('ip1_webhook_claim', claim)
redis.register_function('ip1_webhook_record', record)
redis.register_function('ip1_webhook_pause', pause)
redis.register_function('ip1_webhook_release', function(keys, args) return release(keys[1], args[1]) end)
redis.register_function('ip1_webhook_replay', replay)
redis.register_function('ip1_webhook_deliveries', deliveries)
redis.register_function('ip1_webhook_delivery', delivery)
redis.register_function('ip1_webhook_forget', forget)
redis.register_function('ip1_webhook_put', put)
